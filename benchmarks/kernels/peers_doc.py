"""The table of docs/results/kernels.md that sets our steps beside others' kernels, from the results of `peers.py`."""

from typing import Any

from benchmarks.common.generated import Data, where_measured
from benchmarks.common.markdown_tables import pipe

FILE = "ops-peers-h100.json"
Rows = list[dict[str, Any]]


def peers(data: Data | None) -> str:
    """A row a step; of a package that has several ways, the fastest."""
    if not data or not data["rows"]:
        return "Not measured yet: `python benchmarks/kernels/peers.py`."
    others = {"humming": "base + humming", "gemlite": "base + gemlite"}
    others |= {f"vllm lora{rank}": f"base + vLLM LoRA {rank}" for rank in (16, 64)}
    head = ["tokens", "experts", "floor, ms", "base, ms", "meswitch, ms", *(f"{what}, ms" for what in others.values())]
    head += [f"deltas alone, GB/s: {name}" for name in ("meswitch", "humming")]
    cells = []
    for tokens, experts in sorted({(row["tokens"], row["experts"]) for row in data["rows"]}):
        step = [row for row in data["rows"] if (row["tokens"], row["experts"]) == (tokens, experts)]
        own = _best(step, "meswitch", "ms")
        times = [_best(step, name, "ms") for name in others]
        rates = [_best(step, name, "gb_s", max) for name in ("meswitch", "humming")]
        cells.append(
            [
                str(tokens),
                str(experts),
                f"{step[0]['floor_ms']:.2f}",
                _number(_best(step, "base", "ms")),
                _number(own),
                *(f"{ms:.2f} ({ms / own:.2f}x)" if ms and own else _number(ms) for ms in times),
                *(f"{rate:.0f}" if rate else "-" for rate in rates),
            ]
        )
    return f"{pipe(head, *cells)}\n\n{where_measured(data['meta'])}"


def _best(rows: Rows, name: str, figure: str, choose: Any = min) -> float | None:
    """Of a package's ways, whose names begin with its own."""
    found = [row[figure] for row in rows if row["way"].startswith(name) and row[figure]]
    return choose(found) if found else None


def _number(value: float | None) -> str:
    return f"{value:.2f}" if value else "-"

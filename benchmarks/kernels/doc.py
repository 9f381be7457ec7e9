"""Fill the tables and plots of docs/results/kernels.md from the results of `ops.py`, `sweep.py` and `peers.py`.

python benchmarks/kernels/doc.py            rewrite what is out of date
python benchmarks/kernels/doc.py --check    say so instead, and exit 1
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.common.generated import Data, Plot, arguments_of, legend, stored, update
from benchmarks.common.markdown_tables import pipe
from benchmarks.kernels import peers_doc

FILE, SWEEP = "ops-h100.json", "ops-sweep-h100.json"
NOT_YET = "Not measured yet: `python benchmarks/kernels/ops.py`."
Rows = list[dict[str, Any]]


def select(rows: Rows, **wanted: object) -> Rows:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def decode(data: Data) -> str:
    """Every step of distinct experts at 2 bits."""
    rows = select(data["decode"], spread="distinct", bits=2)
    others = {"bitdelta_ms": "1 bit", "lora16_ms": "LoRA 16", "lora64_ms": "LoRA 64"}
    head = ["model", "tokens", "experts", "path", "ms", "of the floor", "of the base", "against merged"]
    cells = [
        [
            row["model"],
            str(row["batch"]),
            str(row["experts"]),
            row["path"],
            f"{row['ms']:.2f}",
            f"{row['ratio_to_floor']:.2f}",
            f"{row['ratio_to_base']:.2f}",
            f"{row['speedup_vs_merged']:.2f}x",
            f"{_added(row) / data['meta']['copy_gb_s']:.0%}",
            _of_copy(row, data),
            *(f"{row[name]:.2f}" if name in row else "-" for name in others),
        ]
        for row in rows
    ]
    head += ["deltas in the step, of copy", "alone, of copy", *(f"{label}, ms" for label in others.values())]
    return f"{pipe(head, *cells)}\n\n{said(data)}"


def answer(data: Data) -> str:
    """Steps of the first model at its largest batch and at 8 tokens, beside what else could answer them."""
    model = data["decode"][0]["model"]
    rows = select(data["decode"], spread="distinct", bits=2, model=model)
    shown = [row for row in rows if row["batch"] in (8, max(row["batch"] for row in rows))]
    head = ["tokens", "experts", "floor", "meswitch", "merged, in turn", "base and LoRA 64"]
    cells = [
        [
            str(row["batch"]),
            str(row["experts"]),
            f"{row['floor_ms']:.2f}",
            f"{row['ms']:.2f} ({row['ratio_to_floor']:.2f}x)",
            f"{row['ms'] * row['speedup_vs_merged']:.2f}",
            f"{row['lora64_ms']:.2f}" if "lora64_ms" in row else "-",
        ]
        for row in shown
    ]
    return f"{pipe(head, *cells)}\n\n{model}, deltas of 2 bits. {said(data)}"


def spreads(data: Data) -> str:
    """Steps whose tokens are not one an expert."""
    rows = [row for row in data["decode"] if row["spread"] != "distinct"]
    head = ["model", "tokens", "spread over 8 slots", "experts met", "ms", "of the floor", "against merged"]
    cells = [
        [
            row["model"],
            str(row["batch"]),
            row["spread"],
            str(row["active"]),
            *_against(row),
        ]
        for row in rows
    ]
    return pipe(head, *cells) if cells else NOT_YET


def widths(data: Data) -> str:
    """Steps at other widths than 2 bits, and those of 2 bits beside them."""
    others = {(row["model"], row["batch"], row["experts"]) for row in data["decode"] if row["bits"] != 2}
    rows = select(data["decode"], spread="distinct")
    rows = [row for row in rows if (row["model"], row["batch"], row["experts"]) in others]
    rows.sort(key=lambda row: (row["model"], row["batch"], row["experts"], row["bits"]))
    head = ["model", "tokens", "experts", "bits", "ms", "of the floor", "against merged", "delta alone, of copy"]
    cells = [
        [
            row["model"],
            *(str(row[name]) for name in ("batch", "experts", "bits")),
            *_against(row),
            _of_copy(row, data),
        ]
        for row in rows
    ]
    return pipe(head, *cells) if cells else NOT_YET


def items(data: Data) -> str:
    """What choosing by tables costs against the best items of each linear and step: sums over a layer."""
    steps: dict[tuple, list[float]] = {}
    for row in data["sweep"]:
        sums = steps.setdefault((row["model"], row["batch"], row["experts"], row["spread"]), [0.0, 0.0])
        sums[0] += row["floor_us"]
        sums[1] += max(0.0, row["slower_us"])  # the chosen items are measured twice where they are the best
    head = [
        "model",
        "tokens",
        "experts",
        "spread",
        "floor, us a layer",
        "slower than the best items, us",
        "of the floor",
    ]
    cells = [
        [model, str(batch), str(experts), kind, f"{floor:.0f}", f"{slower:.1f}", f"{slower / floor:.0%}"]
        for (model, batch, experts, kind), (floor, slower) in steps.items()
    ]
    return f"{pipe(head, *cells)}\n\n{said(data)}"


def prefill(data: Data) -> str:
    """The package's way, each of its two ways for all segments, and the fastest other one; of the base's products."""
    rows = data["prefill"]
    if not rows:
        return NOT_YET
    head = [
        "tokens",
        "experts",
        "spread",
        "base, ms a layer",
        "meswitch, ms",
        "of the base",
        "all restoring",
        "all merging",
        "fastest other",
        "of the base",
    ]
    cells = []
    for key in dict.fromkeys((row["bits"], row["tokens"], row["experts"], row["spread"]) for row in rows):
        same = select(rows, bits=key[0], tokens=key[1], experts=key[2], spread=key[3])
        own = [row for row in same if row["path"] == "package"]
        if own:
            ways = {row["path"]: row for row in same}
            others = [row for row in same if row["path"] in ("grouped", "decode_kernel", "two_products")]
            other = min(others, key=lambda row: row["ms"])
            cells.append(
                [
                    *map(str, key[1:]),
                    f"{own[0]['base_ms']:.2f}",
                    f"{own[0]['ms']:.2f}",
                    f"{own[0]['ratio_to_base']:.2f}",
                    f"{ways['restoring']['ratio_to_base']:.2f}",
                    f"{ways['merging']['ratio_to_base']:.2f}",
                    other["path"].replace("_", " "),
                    f"{other['ratio_to_base']:.2f}",
                ]
            )
    return pipe(head, *cells)


def _against(row: dict[str, Any]) -> list[str]:
    """A step's milliseconds, over the floor, and merged models' over them."""
    return [f"{row['ms']:.2f}", f"{row['ratio_to_floor']:.2f}", f"{row['speedup_vs_merged']:.2f}x"]


def _added(row: dict[str, Any]) -> float:
    """GB/s of the deltas in a step: their bytes over what the step takes more than the base alone."""
    gigabytes: float = row["delta_gb_s"] * row["delta_ms"] / 1e3
    return gigabytes / (row["ms"] - row["base_ms"]) * 1e3


def _of_copy(row: dict[str, Any], data: Data) -> str:
    return f"{row['delta_gb_s'] / data['meta']['copy_gb_s']:.0%}"


def checks(data: Data) -> str:
    rows = data["check"]
    worst = max(value for row in rows for name, value in row.items() if name == "error")
    passed = sum(row["pass"] for row in rows)
    return f"{passed} of {len(rows)} numerical checks against fp64 pass; the worst relative error is {worst:.1e}."


def said(data: Data) -> str:
    meta = data["meta"]
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return f"{meta['card']}, copy {meta['copy_gb_s'] / 1e3:.2f} TB/s, {versions}, {meta['date'][:10]}."


def floor_data(data: Data) -> Data:
    """{model: {tokens: [[experts, ms / floor], ...]}}"""
    return _curves(data["decode"], "ratio_to_floor")


def step_data(data: Data) -> Data:
    """{what: [[experts, ms], ...]} at the largest batch of the first model."""
    rows = select(data["decode"], spread="distinct", bits=2, model=data["decode"][0]["model"])
    rows = select(rows, batch=max(row["batch"] for row in rows))
    lines = {
        "floor": "floor_ms",
        "meswitch": "ms",
        "merged models in turn": "merged_ms",
        "LoRA rank 16": "lora16_ms",
        "LoRA rank 64": "lora64_ms",
    }
    return {
        label: [[row["experts"], _short(row[name])] for row in rows if name in row] for label, name in lines.items()
    }


def _curves(rows: Rows, figure: str) -> Data:
    found: Data = {}
    for row in select(rows, spread="distinct", bits=2):
        curves = found.setdefault(row["model"], {})
        curves.setdefault(f"{row['batch']} tokens", []).append([row["experts"], _short(row[figure])])
    return found


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def draw_floor(data: Data, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(1, len(data), figsize=(3.2 * len(data), 3.2), sharey=True, squeeze=False)
    for axis, (model, curves) in zip(axes[0], data.items(), strict=True):
        for label, curve in curves.items():
            axis.plot(*zip(*curve, strict=True), ".-", label=label)
        axis.set(title=model, xlabel="distinct experts")
        _grid(axis, (experts for curve in curves.values() for experts, _ in curve))
        axis.axhline(1, color="#999999", linewidth=0.6)
    axes[0][0].set_ylabel("time / bytes at copy bandwidth")
    legend(figure)
    return figure


def draw_step(data: Data, pyplot: Any) -> Any:
    figure, axis = pyplot.subplots(figsize=(5.2, 3.6))
    for label, curve in data.items():
        style = {"floor": {"color": "#999999", "linestyle": ":"}, "meswitch": {"color": "#000000", "linewidth": 2}}
        axis.plot(*zip(*curve, strict=True), marker=".", label=label, **style.get(label, {}))
    axis.set(xlabel="distinct experts", ylabel="ms, all linears of a decode step", yscale="log")
    _grid(axis, (experts for curve in data.values() for experts, _ in curve))
    legend(figure)
    return figure


def _grid(axis: Any, experts: Iterable[int]) -> None:
    ticks = sorted(set(experts))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.grid(alpha=0.3)


def main(arguments: list[str] | None = None) -> None:
    options = arguments_of(__doc__, "results/kernels.md", arguments)
    data, swept = _stored(FILE, "ops.py"), _stored(SWEEP, "sweep.py")
    makers = {"answer": answer, "decode": decode, "spreads": spreads, "widths": widths, "prefill": prefill}
    places = {name: make(data) for name, make in [*makers.items(), ("checks", checks)]}
    places["items"] = items(swept)
    places["peers"] = peers_doc.peers(stored(peers_doc.FILE))
    plots = {
        "floor": Plot(floor_data(data), draw_floor, "Time of a decode step over the floor"),
        "step": Plot(step_data(data), draw_step, "A decode step of 32 tokens"),
    }
    update(options.doc, "benchmarks/kernels/doc.py", places, plots, check=options.check, redraw=options.redraw)


def _stored(file: str, script: str) -> Data:
    data = stored(file)
    if data is None:
        raise SystemExit(f"benchmarks/results/{file}: no such file; run `python benchmarks/kernels/{script}` on a GPU")
    return data


if __name__ == "__main__":
    main()

"""Which items suit which linear: the fused kernel with every sensible choice, against what `choose_fused` takes.

    PYTHONPATH=src python benchmarks/kernels/sweep.py --out benchmarks/results/ops-sweep-h100.json

On a GPU; a model is swept in half a minute. Between two launches runs a small kernel of another kind, as norms and
attention do in a model: launches that follow each other start in the shade of the one before, which suits other items.
Times are with that kernel, so only what one choice takes more than another is stored.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from meswitch.ops import Routing
from meswitch.ops.layout import Variant
from meswitch.ops.routing import bucket
from meswitch.ops.triton.ahead import Compilation, compile_ahead, fused_job
from meswitch.ops.triton.fused import fused
from meswitch.ops.triton.items import BROAD_ROWS, Config, FusedConfig, choose_fused

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.kernels.shapes import DEVICE, MODELS, Layer, delta_bytes, random_layer, spread
from benchmarks.kernels.timing import copy_gb_s, graph_ms, measured_on

# batch, experts, spread
CASES = [(b, e, "distinct") for b in (1, 8, 16, 32) for e in (1, 4, 8, 16) if e <= b]
CASES += [(32, 8, "zipf"), (32, 8, "skewed"), (64, 4, "distinct")]
FEW = [(b, e, "distinct") for b, e in ((1, 1), (8, 4), (32, 1), (32, 4), (32, 8), (32, 16))]
# a layer's linears and the steps; besides a large model a part of it, as each of two GPUs has, and small ones
PLAN = {
    "mistral-7b": (MODELS["mistral-7b"][1], CASES),
    "mistral-7b, of two GPUs": (
        {"qkv": (3072, 4096), "o": (4096, 2048), "gate_up": (14336, 4096), "down": (4096, 7168)},
        FEW,
    ),
    "llama-3.2-3b": ({"qkv": (5120, 3072), "o": (3072, 3072), "gate_up": (16384, 3072), "down": (3072, 8192)}, FEW),
    "qwen3-1.7b": ({"qkv": (4096, 2048), "o": (2048, 2048), "gate_up": (12288, 2048), "down": (2048, 6144)}, FEW),
}
_ORDERS = [(1.0, 1), (0.5, 1), (0.0, 1)]  # `before` and `every` of a FusedConfig
_WIDE_ORDERS = [(1.0, 1), (0.75, 1), (0.5, 1), (0.0, 3)]
_LEAST_BYTES = 200_000_000  # of a linear's weights, so that L2 holds few of them between two uses


def _grid(columns: int, rows: int) -> Iterator[FusedConfig]:
    wide = rows > BROAD_ROWS
    blocks = [(128, 64, 3), (128, 64, 2), (64, 64, 3), (64, 128, 3)]
    if columns > 32:
        blocks = [(128, 64, 2), (64, 64, 3), (64, 128, 2)]
    splits, orders = ((1,), _WIDE_ORDERS) if wide else ((1, 2, 4), _ORDERS)
    for block, base, delta, order in itertools.product(blocks, (1, 2) if wide else (1, 2, 3, 4), splits, orders):
        yield FusedConfig(Config(128, 8, delta), columns, base, *block, *order)


def _cases(name: str) -> Iterator[tuple[Routing, int, tuple[int, int, str], str, int, int]]:
    shapes, cases = PLAN[name]
    for case in cases:
        batch, experts, kind = case
        routing = Routing.build(spread(kind, batch, experts), DEVICE)
        for linear, (rows, width) in shapes.items():
            yield routing, bucket(batch, least=8), case, linear, rows, width


def wanted(name: str) -> list[Compilation]:
    """What `compile_ahead` takes."""
    found = []
    for routing, columns, _, _, rows, width in _cases(name):
        again = routing.slots.numel() > routing.likely
        for config in [choose_fused(rows, width, routing.likely, columns), *_grid(columns, rows)]:
            found.append(fused_job(rows, width, Variant(True, False, 128, 16), torch.bfloat16, config, again=again))
    return found


def sweep(name: str, copy: float) -> list[dict]:
    """How much slower the chosen items of each linear and case are than the best; prints a line each. copy: GB/s."""
    layers = {linear: _layers(linear, *shape) for linear, shape in PLAN[name][0].items()}
    found = []
    for routing, columns, (batch, experts, kind), linear, rows, width in _cases(name):
        x = torch.randn(batch, width, device=DEVICE).bfloat16()
        y = torch.zeros(batch, rows, dtype=torch.bfloat16, device=DEVICE)
        took = partial(_apart_us, layers[linear], x, y, routing)
        times = {config: took(config) for config in _grid(columns, rows)}
        best = min(times, key=lambda config: times[config])
        chosen = choose_fused(rows, width, routing.likely, columns)
        row = {
            "model": name,
            "batch": batch,
            "experts": experts,
            "spread": kind,
            "linear": linear,
            "floor_us": round((rows * width * 2 + experts * delta_bytes(rows, width, 2)) / copy / 1e3, 2),
            "chosen": _text(chosen),
            "best": _text(best),
            "slower_us": round(took(chosen) - times[best], 2),
        }
        print(
            f"{name} B{batch} E{experts} {kind} {linear}: floor {row['floor_us']:.1f}, chosen ({row['chosen']}) "
            f"{row['slower_us']:.1f} slower than best ({row['best']})",
            flush=True,
        )
        found.append(row)
    return found


def _layers(linear: str, rows: int, width: int) -> list[Layer]:
    count = max(3, math.ceil(_LEAST_BYTES / (rows * width * 2)))
    return [random_layer(linear, rows, width, 2, experts=16) for _ in range(count)]


def _apart_us(layers: list[Layer], x: torch.Tensor, y: torch.Tensor, routing: Routing, config: FusedConfig) -> float:
    """Microseconds of a launch and of the small kernel behind it."""
    other = torch.empty_like(x)

    def run() -> None:
        for layer in layers:
            fused([y], x, [layer.weight], [None], [layer.deltas], routing, config)
            torch.neg(x, out=other)

    return graph_ms(run, 5) * 1e3 / len(layers)


def _text(c: FusedConfig) -> str:
    return (
        f"base {c.base_channels} channels x {c.base_rows} rows x {c.base_split} parts, {c.base_stages} stages; "
        f"deltas {c.delta.split} parts, {c.before:.0%} before the base"
        + (f", then one of {c.every} is the base's" if c.every > 1 else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--model", choices=PLAN, action="append", help="only this one; may be repeated")
    parser.add_argument("--workers", type=int, default=15, help="threads that compile")
    options = parser.parse_args()
    begin, names = time.perf_counter(), options.model or list(PLAN)
    print(f"{compile_ahead(itertools.chain.from_iterable(map(wanted, names)), options.workers)} kernels compiled")
    copy = max(copy_gb_s().values())
    meta = measured_on() | {"copy_gb_s": copy}
    rows: list[dict] = []
    for name in names:
        torch.cuda.empty_cache()
        rows += sweep(name, copy)
        options.out.write_text(json.dumps({"meta": meta, "sweep": rows}, indent=1) + "\n")
        print(f"-- {name} at {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()

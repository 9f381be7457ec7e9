"""Which items suit which linear: the fused kernel with every sensible choice, against what `choose_fused` takes.

Between two launches runs a small kernel of another kind, as norms and attention do in a model; its time is taken off.
Launches that follow each other start in the shade of the one before, which suits other items.
"""

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from meswitch.ops import Routing
from meswitch.ops.ahead import Job, fused_job
from meswitch.ops.items import WIDE_ROWS, Config, FusedConfig, choose_fused
from meswitch.ops.routing import bucket
from meswitch.ops.slots import Variant
from meswitch.ops.triton_launch import fused
from ops_models import DEVICE, MODELS, Layer, delta_bytes, spread
from ops_timing import graph_ms

# batch, experts, spread
CASES = [(b, e, "distinct") for b in (1, 8, 16, 32) for e in (1, 4, 8, 16) if e <= b]
CASES += [(32, 8, "zipf"), (32, 8, "skewed"), (64, 4, "distinct")]
_ORDERS = [(1.0, 1), (0.5, 1), (0.0, 1)]  # `before` and `every` of a FusedConfig
_WIDE_ORDERS = [(1.0, 1), (0.75, 1), (0.5, 1), (0.0, 3)]


def _grid(columns: int, rows: int) -> Iterator[FusedConfig]:
    wide = rows > WIDE_ROWS
    blocks = [(128, 64, 3), (128, 64, 2), (64, 64, 3), (64, 128, 3)]
    if columns > 32:
        blocks = [(128, 64, 2), (64, 64, 3), (64, 128, 2)]
    splits, orders = ((1,), _WIDE_ORDERS) if wide else ((1, 2, 4), _ORDERS)
    for block, base, delta, order in itertools.product(blocks, (1, 2) if wide else (1, 2, 3, 4), splits, orders):
        yield FusedConfig(Config(128, 8, delta), columns, base, *block, *order)


def _cases(name: str) -> Iterator[tuple[Routing, int, tuple[int, int, str], str, int, int]]:
    for case in CASES:
        batch, experts, kind = case
        routing = Routing.build(spread(kind, batch, experts), DEVICE)
        for linear, (rows, width) in MODELS[name][1].items():
            yield routing, bucket(batch, least=8), case, linear, rows, width


def wanted(name: str) -> list[Job]:
    """What `compile_ahead` takes."""
    found = []
    for routing, columns, _, _, rows, width in _cases(name):
        chosen = choose_fused(rows, width, routing.likely, columns)
        for config in [chosen, *_grid(columns, rows)]:
            found.append(fused_job(rows, width, Variant(True, False, 128, 16), torch.bfloat16, config))
    return found


def sweep(name: str, layers: list[Layer], copy_gb_s: float) -> list[dict]:
    """Microseconds of each linear and case, chosen, best and all in `_grid`'s order; prints a line each."""
    found = []
    for routing, columns, (batch, experts, kind), linear, rows, width in _cases(name):
        own = [layer for layer in layers if layer.name == linear]
        x = torch.randn(batch, width, device=DEVICE).bfloat16()
        y = torch.zeros(batch, rows, dtype=torch.bfloat16, device=DEVICE)
        took = partial(_apart_us, own, x, y, routing)
        alone = took(None)
        times = {config: took(config) - alone for config in _grid(columns, rows)}
        best = min(times, key=lambda config: times[config])
        chosen = choose_fused(rows, width, routing.likely, columns)
        row = {
            "batch": batch,
            "experts": experts,
            "spread": kind,
            "linear": linear,
            "floor_us": (rows * width * 2 + experts * delta_bytes(rows, width, 2)) / copy_gb_s / 1e3,
            "chosen": _text(chosen),
            "chosen_us": took(chosen) - alone,
            "best": _text(best),
            "best_us": times[best],
            "grid_us": [round(time, 2) for time in times.values()],
        }
        print(
            f"B{batch} E{experts} {kind} {linear}: floor {row['floor_us']:.1f}, chosen {row['chosen_us']:.1f} "
            f"({row['chosen']}), best {row['best_us']:.1f} ({row['best']})",
            flush=True,
        )
        found.append(row)
    return found


def _apart_us(
    layers: list[Layer], x: torch.Tensor, y: torch.Tensor, routing: Routing, config: FusedConfig | None
) -> float:
    """Microseconds of a launch and of the small kernel behind it, by layer; without a config of the latter alone."""
    other = torch.empty_like(x)

    def run() -> None:
        for layer in layers:
            if config:
                fused(y, x, layer.weight, None, layer.deltas, routing, config)
            torch.neg(x, out=other)

    return graph_ms(run, 5) * 1e3 / len(layers)


def _text(c: FusedConfig) -> str:
    return (
        f"base {c.base_channels} channels x {c.base_rows} rows x {c.base_split} parts, {c.base_stages} stages; "
        f"deltas {c.delta.split} parts, {c.before:.0%} before the base"
        + (f", then one of {c.every} is the base's" if c.every > 1 else "")
    )

"""Which tiles suit which shape and bucket: every candidate timed on the same layers."""

import math

import torch

from meswitch.ops import Routing
from meswitch.ops.triton_launch import Config, choose, constants, decode
from ops_models import DEVICE, Layer, delta_bytes, spread
from ops_timing import graph_ms

# tokens bucket -> (rows of a tile, warps, stages)
CANDIDATES = {
    8: [(r, w, s) for r, w in ((128, 2), (64, 2), (64, 1)) for s in (2, 3, 4)],
    16: [(r, w, s) for r, w in ((128, 2), (64, 2), (64, 1), (128, 4)) for s in (2, 3)],
    32: [(64, 2, 2), (64, 2, 3), (128, 4, 2), (128, 4, 3), (64, 4, 3)],
}
SPLITS = {1: (1, 2, 4, 8), 4: (1, 2, 4), 16: (1, 2)}  # by experts
CASES = [(8, 1, 1), (8, 4, 4), (8, 16, 16), (16, 16, 1), (16, 32, 4), (32, 32, 1)]  # bucket, tokens, experts


def candidates(tokens: int, experts: int) -> list[Config]:
    return [Config(r, tokens, split, w, s) for r, w, s in CANDIDATES[tokens] for split in SPLITS[experts]]


def wanted(shapes: dict[str, tuple[int, int]]) -> list[tuple[tuple, dict]]:
    """What `ops_timing.compile_all` takes. All shapes are even in rows and channels, so one of them stands for all."""
    rows, width = shapes["qkv"]
    found = []
    for tokens, _, experts in CASES:
        configs = candidates(tokens, experts)
        configs += [choose(*shape, experts, tokens) for shape in shapes.values()]
        for config in configs:
            key = (torch.bfloat16, rows, width, config.split)
            found.append((key, constants(config, rows, width, True, False, 128, 16)))
    return found


def sweep(layers: list[list[Layer]], copy: float) -> list[dict]:
    """layers: of the model, each its linears. Prints the best three of each case and what `choose` takes."""
    rows = []
    for tokens, batch, experts in CASES:
        routing = Routing.build(spread("distinct", batch, experts), DEVICE, experts=experts, max_tokens=tokens)
        for i, first in enumerate(layers[0]):
            shape = first.weight.shape
            nbytes = delta_bytes(*shape, 2) * experts
            used = [layer[i] for layer in layers[: max(4, min(len(layers), math.ceil(4e8 / nbytes)))]]
            x = torch.randn(batch, shape[1], device=DEVICE).bfloat16()
            y = torch.zeros(batch, shape[0], device=DEVICE).bfloat16()
            chosen, timed = choose(*shape, experts, tokens), []
            for config in {*candidates(tokens, experts), chosen}:
                try:
                    ms = graph_ms(lambda c=config, u=used, x=x, y=y, r=routing: _run(u, x, y, r, c), 5)
                except Exception as failure:  # noqa: BLE001 - too much shared memory, for one
                    print(f"  {config}: {type(failure).__name__} {str(failure)[:80]}")
                    continue
                timed.append((ms / len(used) * 1e3, config))
            timed.sort(key=lambda t: t[0])
            own = next(us for us, config in timed if config == chosen)
            best = "  ".join(f"{us:.1f}us {c.rows}/w{c.warps}/s{c.stages}/k{c.split}" for us, c in timed[:3])
            share = nbytes / timed[0][0] / 1e3 / copy
            label = f"{first.name:8} M{tokens:<2} B{batch:<2} E{experts:<2}"
            print(f"{label} best {share:4.0%} of copy: {best} | chosen {own:.1f}us k{chosen.split}", flush=True)

            rows += [
                {
                    "layer": first.name,
                    "bucket": tokens,
                    "batch": batch,
                    "experts": experts,
                    "us": us,
                    "rows": c.rows,
                    "warps": c.warps,
                    "stages": c.stages,
                    "split": c.split,
                }
                for us, c in timed
            ]
    return rows


def _run(layers: list[Layer], x: torch.Tensor, y: torch.Tensor, routing: Routing, config: Config) -> None:
    for layer in layers:
        d, v = layer.deltas, layer.deltas.variant
        decode(
            y,
            x,
            d.arena,
            d.table,
            d.arrived,
            routing.slots,
            routing.starts,
            routing.order,
            routing.max_tokens,
            v.two,
            v.one,
            v.group,
            v.salient,
            config,
        )

"""Ways to compute the linears of a prefill step; every one takes layers, inputs by width and outputs by rows."""

from collections.abc import Callable
from itertools import accumulate

import torch

from benchmarks.kernels.shapes import DEVICE, Layer
from meswitch.ops.prefill import expert_prefill, merged_rows
from meswitch.ops.routing import PrefillRouting, tile_table
from meswitch.ops.triton.product import product

Buffers = dict[int, torch.Tensor]
Path = Callable[[], None]
ALWAYS, NEVER = 1, 1 << 30  # weights of an expert's own


def token_slots(lengths: list[int]) -> list[int]:
    """Expert 0's tokens, then expert 1's, ..."""
    return [slot for slot, length in enumerate(lengths) for _ in range(length)]


def base(layers: list[Layer], x: Buffers, y: Buffers) -> Path:
    def run() -> None:
        for layer in layers:
            rows, width = layer.weight.shape
            torch.mm(x[width], layer.weight.T, out=y[rows])

    return run


def package(
    layers: list[Layer], x: Buffers, slots: list[int], own_from: int | None = None, restore: bool = True
) -> Path:
    """What the package does; without `restore`, on GPUs that have no `wgmma`."""
    routing = PrefillRouting.build(slots, DEVICE, own_from=own_from)

    def run() -> None:
        for layer in layers:
            expert_prefill(x[layer.weight.shape[1]], layer.weight, layer.deltas, routing, restore=restore)

    return run


def restoring(layers: list[Layer], x: Buffers, y: Buffers, lengths: list[int]) -> Path:
    """Every segment, however long or short, by the product that restores weights as it loads them."""
    ends = [0, *accumulate(lengths)]
    segments = [(ends[e], ends[e + 1], e) for e in range(len(lengths))]
    tiles = tile_table(segments, ends[-1]).to(DEVICE)

    def run() -> None:
        for layer in layers:
            rows, width = layer.weight.shape
            product(y[rows], x[width], layer.weight, None, layer.deltas, tiles)

    return run


def grouped(layers: list[Layer], x: Buffers, lengths: list[int]) -> Path:
    """All experts' weights at once, one grouped product."""
    slots = torch.arange(len(lengths), dtype=torch.int32, device=DEVICE)
    ends = torch.tensor(list(accumulate(lengths)), dtype=torch.int32, device=DEVICE)

    def run() -> None:
        for layer in layers:
            rows, width = layer.weight.shape
            merged = layer.weight.new_empty(len(lengths), rows, width)
            merged_rows(layer.weight, layer.deltas, slots, 0, rows, merged)
            torch._grouped_mm(x[width], merged.transpose(1, 2), offs=ends)

    return run


def two_products(layers: list[Layer], x: Buffers, y: Buffers, lengths: list[int]) -> Path:
    """The base's product for all, then one of restored deltas: twice the operations. Merging into zeros restores."""
    slots = torch.arange(len(lengths), dtype=torch.int32, device=DEVICE)
    zeros = {layer.weight.shape: torch.zeros_like(layer.weight) for layer in layers}
    ends = [0, *accumulate(lengths)]

    def run() -> None:
        for layer in layers:
            rows, width = layer.weight.shape
            torch.mm(x[width], layer.weight.T, out=y[rows])
            restored = layer.weight.new_empty(len(lengths), rows, width)
            merged_rows(zeros[layer.weight.shape], layer.deltas, slots, 0, rows, restored)
            for e in range(len(lengths)):
                mine = slice(ends[e], ends[e + 1])
                y[rows][mine].addmm_(x[width][mine], restored[e].T)

    return run

"""Ways to compute the linears of a prefill step; every one takes layers, inputs by width and outputs by rows."""

from collections.abc import Callable
from itertools import accumulate

import torch

from meswitch.ops.merge import MOST, merge
from meswitch.ops.prefill import SCRATCH, block_rows, expert_prefill
from meswitch.ops.prefill_routing import MERGE_FROM, PrefillRouting
from ops_models import DEVICE, Layer

Buffers = dict[int, torch.Tensor]
Path = Callable[[], None]
ALWAYS, NEVER = 1, 1 << 30  # merge


def token_slots(lengths: list[int]) -> list[int]:
    """Expert 0's tokens, then expert 1's, ..."""
    return [slot for slot, length in enumerate(lengths) for _ in range(length)]


def base(layers: list[Layer], x: Buffers, y: Buffers) -> Path:
    def run() -> None:
        for layer in layers:
            rows, width = layer.weight.shape
            torch.mm(x[width], layer.weight.T, out=y[rows])

    return run


def product(
    layers: list[Layer], x: Buffers, slots: list[int], merge_from: int = MERGE_FROM, scratch: int = SCRATCH
) -> Path:
    """What the package does."""
    routing = PrefillRouting.build(slots, DEVICE, merge_from=merge_from)

    def run() -> None:
        for layer in layers:
            expert_prefill(x[layer.weight.shape[1]], layer.weight, layer.deltas, routing, scratch=scratch)

    return run


def grouped(layers: list[Layer], x: Buffers, lengths: list[int]) -> Path:
    """All experts' weights at once, one grouped product."""
    slots = torch.arange(len(lengths), dtype=torch.int32, device=DEVICE)
    ends = torch.tensor(list(accumulate(lengths)), dtype=torch.int32, device=DEVICE)

    def run() -> None:
        for layer in layers:
            rows, width = layer.weight.shape
            merged = layer.weight.new_empty(len(lengths), rows, width)
            merge(layer.weight, layer.deltas, slots, 0, rows, merged)
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
            merge(zeros[layer.weight.shape], layer.deltas, slots, 0, rows, restored)
            for e in range(len(lengths)):
                mine = slice(ends[e], ends[e + 1])
                y[rows][mine].addmm_(x[width][mine], restored[e].T)

    return run


def one_by_one(layers: list[Layer], x: Buffers, y: Buffers, lengths: list[int], scratch: int) -> Path:
    """Each expert in turn: reads W for every one, but what is merged is small enough to stay in the cache."""
    slots = [torch.tensor([e], dtype=torch.int32, device=DEVICE) for e in range(len(lengths))]
    ends = [0, *accumulate(lengths)]
    room = torch.empty(scratch // 2, dtype=torch.bfloat16, device=DEVICE)

    def run() -> None:
        for layer in layers:
            rows, width = layer.weight.shape
            step = block_rows(rows, width, 1, scratch)
            for start in range(0, rows, step):
                end = min(start + step, rows)
                merged = room[: (end - start) * width].view(1, -1, width)
                for e in range(len(lengths)):
                    mine = slice(ends[e], ends[e + 1])
                    merge(layer.weight, layer.deltas, slots[e], start, end, merged)
                    torch.mm(x[width][mine], merged[0].T, out=y[rows][mine, start:end])

    return run


def ahead(layers: list[Layer], x: Buffers, y: Buffers, lengths: list[int]) -> Path:
    """Merge the next block of rows on a second stream while this one is multiplied: fills the last waves' idle time."""
    if len(lengths) > MOST:
        raise ValueError(f"{len(lengths)} experts")
    slots = torch.arange(len(lengths), dtype=torch.int32, device=DEVICE)
    ends = [0, *accumulate(lengths)]
    room = [torch.empty(SCRATCH // 2, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    side = torch.cuda.Stream()
    blocks = []
    for layer in layers:
        rows, width = layer.weight.shape
        step = block_rows(rows, width, len(lengths), SCRATCH)
        blocks += [(layer, start, min(start + step, rows)) for start in range(0, rows, step)]

    def run() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        done: list[torch.cuda.Event | None] = [None, None]
        for i, (layer, start, end) in enumerate(blocks):
            rows, width = layer.weight.shape
            merged = room[i % 2][: len(lengths) * (end - start) * width].view(len(lengths), -1, width)
            with torch.cuda.stream(side):
                free = done[i % 2]
                if free is not None:
                    side.wait_event(free)
                merge(layer.weight, layer.deltas, slots, start, end, merged)
                ready = side.record_event()
            main.wait_event(ready)
            for e in range(len(lengths)):
                mine = slice(ends[e], ends[e + 1])
                torch.mm(x[width][mine], merged[e].T, out=y[rows][mine, start:end])
            done[i % 2] = main.record_event()
        main.wait_stream(side)

    return run

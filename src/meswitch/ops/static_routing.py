"""Which rows of a step of many rows belong to which slot, in static buffers that a captured graph reads in each replay.

Rows are not moved. Where weights can be restored in the product, experts with many rows side by side get weights of
their own and all other rows the base's, in one launch; else all rows get the base's. The rows of experts that have the
base's get their deltas from the decode kernel, in pieces as small as those of a step of few rows: a tile of 64 tokens
takes eight times as long as one of 8, however few of them there are.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from meswitch.ops.prefill_routing import OWN_FROM
from meswitch.ops.restored import TOKENS, on_hopper, tile_table
from meswitch.ops.routing import BASE, PIECE, Routing, most_pieces


class StaticRouting:
    """Buffers for any step of so many rows.

    Args:
        rows: of the largest step.
        slots: of the expert store.

    all: the rows of every expert, in pieces of up to `PIECE`. short: of experts without weights of their own.
    tiles: [1 + room, 4] int32 for `restored.launch`; None where no product restores weights.
    """

    def __init__(self, rows: int, slots: int, device: torch.device) -> None:
        self._slots = slots
        self.all, self.short = (room(rows, slots, PIECE, device) for _ in range(2))
        self.tiles: Tensor | None = None
        if on_hopper(device):
            self.tiles = torch.zeros(1 + most_tiles(rows), 4, dtype=torch.int32, device=device)

    def fill(self, token_slots: Sequence[int]) -> None:
        """Say whose the rows are. token_slots: of as many rows as the graph has that is replayed, with padding."""
        rows = len(self.all.order)
        padded = [*token_slots, *[BASE] * (rows - len(token_slots))]
        fill(self.all, padded)
        if self.tiles is None:
            return
        segments = list(_segments(token_slots))
        table = tile_table(segments, len(token_slots))
        copy(self.tiles[: len(table)], table)
        for first, end, slot in segments:
            if slot != BASE:
                padded[first:end] = [BASE] * (end - first)
        fill(self.short, padded)

    def part(self, rows: int) -> tuple[Routing, Routing, Tensor | None]:
        """`all`, `short` and `tiles` as a graph of so many rows reads them."""
        pieces, likely = most_likely(rows, self._slots, PIECE)
        every, short = (cut(buffers, rows, pieces, likely) for buffers in (self.all, self.short))
        return every, short, None if self.tiles is None else self.tiles[: 1 + most_tiles(rows)]


def _segments(token_slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """First row, end and slot of each stretch that gets one expert's weights, or, as `BASE`, the base's."""
    begun, start = 0, 0
    for slot, own in itertools.groupby(token_slots):
        end = start + sum(1 for _ in own)
        if slot != BASE and end - start >= OWN_FROM:
            if begun < start:
                yield begun, start, BASE
            yield start, end, slot
            begun = end
        start = end
    if begun < start:
        yield begun, start, BASE


def most_tiles(rows: int) -> int:
    """Of a step of so many rows, however they are spread."""
    own = rows // OWN_FROM
    return rows // TOKENS + 2 * own + 1


def room(rows: int, slots: int, piece: int, device: torch.device) -> Routing:
    """Buffers for any step of so many rows; of nobody so far."""
    pieces = most_pieces(rows, slots, piece)
    owners = torch.full((pieces,), BASE, dtype=torch.int32, device=device)
    starts = torch.zeros(pieces + 1, dtype=torch.int32, device=device)
    return Routing(owners, starts, torch.arange(rows, dtype=torch.int32, device=device), piece, pieces)


def fill(buffers: Routing, token_slots: Sequence[int]) -> None:
    """Sort a step's rows into buffers. Even without experts: what was captured with some writes its rows in `order`."""
    routing = Routing.build(token_slots, pieces=len(buffers.slots), piece=buffers.piece)
    copy(buffers.slots, routing.slots)
    copy(buffers.starts, routing.starts)
    copy(buffers.order, routing.order)


def cut(buffers: Routing, rows: int, pieces: int, likely: int) -> Routing:
    """As a step of so many rows reads them."""
    return Routing(buffers.slots[:pieces], buffers.starts[: pieces + 1], buffers.order[:rows], buffers.piece, likely)


def most_likely(rows: int, slots: int, piece: int) -> tuple[int, int]:
    """How many pieces rows of so many slots have at most, and if they are spread evenly."""
    most = most_pieces(rows, slots, piece)
    return most, min(most, max(min(slots, rows), -(-rows // piece)))


def copy(target: Tensor, source: Tensor) -> None:
    """To the beginning of target, in the order of the current stream, without a wait."""
    if target.device.type == "cuda":
        source = source.pin_memory()
    target[: len(source)].copy_(source, non_blocking=True)

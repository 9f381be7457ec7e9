"""The deltas of one linear layer in all slots of an arena."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from meswitch.codec import PackedDelta
from meswitch.errors import ConfigError
from meswitch.ops.layout import ABSENT, Shape, read, write
from meswitch.ops.routing import MAX_TOKENS, bucket, most_pieces

_SMALLEST_TILE = 32  # rows


class Variant(NamedTuple):
    """What a kernel is specialised on, the same for all experts that a layer may ever hold.

    two: the most planes of two bits that an expert has. one: some expert has a plane of one bit. group: see
    `layout.Shape`. salient: the widest padded count.
    """

    two: int
    one: bool
    group: int
    salient: int

    @property
    def planes(self) -> int:
        """The most planes that an expert may have."""
        return self.two + self.one

    @classmethod
    def of(cls, shapes: Iterable[Shape]) -> "Variant":
        """Raises ConfigError if the experts' group sizes differ."""
        shapes = list(shapes)
        groups = {shape.group for shape in shapes}
        if len(groups) > 1:
            raise ConfigError(
                f"group_size: one layer's experts have {sorted(groups)}: the triton backend takes one size a layer; "
                "the backend 'reference' serves any"
            )
        return cls(
            max((shape.planes[0] for shape in shapes), default=0),
            any(shape.planes[1] for shape in shapes),
            max(groups, default=0),
            max((shape.salient for shape in shapes), default=0),
        )


@dataclass(frozen=True, slots=True)
class SlotLinear:
    """One layer's deltas; all tensors lie on one device and keep their addresses.

    arena: [bytes] uint8, 16-byte aligned. table: [slots, 8] int64, `Shape.table_row` of each slot. arrived: [cells]
    int32, zeros that every launch leaves as zeros: how many programs of a tile are done.
    """

    arena: Tensor
    table: Tensor
    arrived: Tensor
    rows: int
    in_features: int
    variant: Variant

    @classmethod
    def over(cls, arena: Tensor, table: Tensor, rows: int, in_features: int, variant: Variant) -> "SlotLinear":
        """A layer whose deltas lie, or will lie, in a shared arena."""
        most = bucket(most_pieces(MAX_TOKENS, len(table)))
        arrived = torch.zeros(_cells(rows, most), dtype=torch.int32, device=arena.device)
        return cls(arena, table, arrived, rows, in_features, variant)

    def for_pieces(self, pieces: int) -> "SlotLinear":
        """The same layer with counters for a routing of so many pieces, if it has not enough."""
        cells = _cells(self.rows, pieces)
        return self if cells <= self.arrived.numel() else replace(self, arrived=self.arrived.new_zeros(cells))

    @classmethod
    def build(cls, deltas: Sequence[PackedDelta | None], device: torch.device | str = "cpu") -> "SlotLinear":
        """A layer of its own arena, one slot a delta; None leaves the base unchanged."""
        present = [delta for delta in deltas if delta is not None]
        shapes = [None if delta is None else Shape.of(delta) for delta in deltas]
        arena = torch.zeros(sum(s.nbytes for s in shapes if s), dtype=torch.uint8, device=device)
        table, offset = [], 0
        for delta, shape in zip(deltas, shapes, strict=True):
            table.append(ABSENT if shape is None else shape.table_row(offset))
            if delta is not None and shape is not None:
                write(delta, arena[offset : offset + shape.nbytes])
                offset += shape.nbytes
        variant = Variant.of(s for s in shapes if s)
        return cls.over(arena, torch.tensor(table).to(device), present[0].rows, present[0].in_features, variant)


def _cells(rows: int, pieces: int) -> int:
    """Counters: one for each tile and piece of a routing."""
    return -(-rows // _SMALLEST_TILE) * pieces


def slot_shape(row: Sequence[int], rows: int, in_features: int, group: int) -> tuple[Shape, int] | None:
    """Shape and first byte of the delta that a table's row points at, None for an absent one."""
    two, one, *places, salient = row
    if not (two or one or salient):
        return None
    shape = Shape(rows, in_features, 2 * two + one, group, salient)
    return shape, places[0] * 16 - shape.offsets()["two"]


def read_slot(arena: Tensor, row: Sequence[int], rows: int, in_features: int, group: int) -> PackedDelta | None:
    """The delta that a table's row points at, None for an absent one."""
    found = slot_shape(row, rows, in_features, group)
    if found is None:
        return None
    shape, first = found
    return read(shape, arena[first : first + shape.nbytes])

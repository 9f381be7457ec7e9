"""One expert's delta of one linear layer, as the GPU kernels read it: a flat run of bytes at fixed offsets.

Codes are split into planes of two bits and one bit, because levels add up: with `code = low + 4 high`,

    2 code - (2^b - 1) = (2 low - 3) + 4 (2 high - (2^(b-2) - 1))

so 3 bits are a 2-bit plane and 4 times a 1-bit plane, 4 bits two 2-bit planes, and a kernel unpacks only two widths.

A plane holds blocks of 16 words for every row; a word has P = 16 or 32 codes, a block 16 P input channels. Code d of
word j is channel `block * 16 P + 16 d + j`: the codes d of a row's 16 words are 16 consecutive channels, one K step of
a matrix unit, and a thread that holds words j and j + 1 has both halves of each operand register without a shuffle.

    planes    [planes, blocks, rows, 16] int32: what a tile of rows reads of a block is contiguous
    scale     [groups, rows] bfloat16
    index     [tiles, salient] int32, ascending, padding repeats channel 0
    salient   [rows, salient] bfloat16, padding is 0

Each tile of 128 rows has salient channels of its own: of q, k and v in one matrix, a tile has those of one of them.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from meswitch.codec import PackedDelta, pack, unpack
from meswitch.codec.quantize import SCALE_DTYPE, group_count
from meswitch.errors import ConfigError
from meswitch.ops.routing import MAX_TOKENS, bucket, most_pieces
from meswitch.pagelock import copy

WORDS = 16  # of a row in a block: the K of one step of a matrix unit
FIELDS = 8  # of a slot's row in the table
SALIENT_ROWS = 128  # that share salient channels; tiles of the kernels divide it
_UNIT = 16  # bytes; the table's offsets count these, so that a kernel knows how its addresses are aligned
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """What fixes the offsets. group: input channels of one scale, 0 for the whole row. salient: of a tile, padded."""

    rows: int
    in_features: int
    bits: int
    group: int
    salient: int

    @classmethod
    def of(cls, delta: PackedDelta) -> "Shape":
        """The shape of a delta; raises ConfigError where no kernel reads it."""
        return cls.sized(delta.rows, delta.in_features, delta.bits, delta.group_size, delta.salient_index.numel())

    @classmethod
    def sized(cls, rows: int, in_features: int, bits: int, group_size: int | None, salient: int) -> "Shape":
        """The shape of a delta of these sizes, as an artifact states them; raises ConfigError like `of`."""
        group = 0 if group_size is None or group_size >= in_features else group_size
        if group and (group < WORDS or group & (group - 1)):
            raise ConfigError(
                f"group_size: {group_size}: the triton backend takes powers of two from {WORDS}, or whole rows; "
                "the backend 'reference' serves any"
            )
        return cls(rows, in_features, bits, group, padded_salient(salient))

    @property
    def planes(self) -> tuple[int, int]:
        """Planes of two bits, planes of one bit."""
        return self.bits // 2, self.bits % 2

    @property
    def groups(self) -> int:
        return group_count(self.in_features, self.group or None)

    def parts(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of each part in the order of the bytes."""
        two, one = self.planes
        return [
            ("two", (two, _blocks(self.in_features, 2), self.rows, WORDS), torch.int32),
            ("one", (one, _blocks(self.in_features, 1), self.rows, WORDS), torch.int32),
            ("scale", (self.groups, self.rows), SCALE_DTYPE),
            ("index", (math.ceil(self.rows / SALIENT_ROWS), self.salient), torch.int32),
            ("salient", (self.rows, self.salient), torch.bfloat16),
        ]

    def offsets(self) -> dict[str, int]:
        """Where each part begins, in bytes."""
        found, offset = {}, 0
        for name, shape, dtype in self.parts():
            found[name] = offset
            offset += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return found | {"end": offset}

    @property
    def nbytes(self) -> int:
        return self.offsets()["end"]

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The parts as views of a [>= nbytes] uint8 buffer."""
        offsets = self.offsets()
        return {
            name: buffer[offsets[name] : offsets[name] + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, shape, dtype in self.parts()
        }

    def table_row(self, offset: int) -> list[int]:
        """What a kernel needs to find this delta at a byte offset of its arena: see `FIELDS`."""
        at = {name: (offset + place) // _UNIT for name, place in self.offsets().items()}
        return [*self.planes, at["two"], at["one"], at["scale"], at["index"], at["salient"], self.salient]


ABSENT = [0] * FIELDS  # the table's row of a slot whose expert leaves the tensor unchanged


def padded_salient(count: int) -> int:
    """Salient channels as the kernel holds them: none, or a power of two that fills a K step."""
    return 0 if not count else max(WORDS, 1 << (count - 1).bit_length())


def salient_of_tiles(counts: Sequence[int], rows: Sequence[int]) -> int:
    """The most salient channels that a tile can have of parts below one another: their counts and rows."""
    most, starts = 0, [0, *itertools.accumulate(rows)]
    for tile in range(0, starts[-1], SALIENT_ROWS):
        met = (start < tile + SALIENT_ROWS and end > tile for start, end in itertools.pairwise(starts))
        most = max(most, sum(itertools.compress(counts, met)))
    return most


def write(delta: PackedDelta, buffer: Tensor, shape: Shape | None = None) -> Shape:
    """Lay a delta out at the start of a [>= nbytes] uint8 buffer, on any device.

    Args:
        shape: with room for more salient channels than the delta has; by default its own.

    Raises:
        ConfigError: some tile has more salient channels than the shape has room for.
    """
    shape = shape or Shape.of(delta)
    parts = shape.views(buffer)
    packed = delta.packed.to(buffer.device)
    if delta.bits == 2:
        parts["two"][0] = _transpose(packed)
    else:
        codes = unpack(packed, delta.bits, delta.in_features)
        for plane in range(shape.planes[0]):
            parts["two"][plane] = _interleave(codes >> (2 * plane) & 3, 2)
        if shape.planes[1]:
            parts["one"][0] = _interleave(codes >> (2 * shape.planes[0]) & 1, 1)
    parts["scale"].copy_(delta.scale[:, : shape.groups].T)
    parts["index"].zero_()
    parts["salient"].zero_()
    if delta.salient_index.numel():
        _write_salient(delta, parts["index"], parts["salient"])
    return shape


def write_by(device: torch.device, delta: PackedDelta, buffer: Tensor, shape: Shape | None = None) -> None:
    """As `write`, into host memory, computed on a device: a GPU is quicker at it."""
    if device.type == "cpu":
        write(delta, buffer, shape)
        return
    laid = torch.empty_like(buffer, device=device)
    write(delta, laid, shape)
    copy(buffer, laid)


def _write_salient(delta: PackedDelta, index: Tensor, salient: Tensor) -> None:
    """Each tile gets the channels that some row of it changes, or all if there is room for them."""
    tiles, room = index.shape
    weights, channels = delta.salient_weight.to(salient.device), delta.salient_index.to(index.device)
    count = len(channels)
    if count <= room:
        index[:, :count] = channels
        salient[:, :count] = weights
        return
    weights = torch.nn.functional.pad(weights, (0, 0, 0, tiles * SALIENT_ROWS - len(weights)))
    weights = weights.view(tiles, SALIENT_ROWS, count)
    used = (weights != 0).any(1)
    if (most := int(used.sum(1).max())) > room:
        raise ConfigError(f"salient: {most} channels, in a place made for {room}")
    first = used.int().argsort(dim=1, descending=True, stable=True)[:, :room]  # the used ones, ascending
    mine = used.gather(1, first)
    index.copy_(channels[first] * mine)
    chosen = weights.gather(2, first[:, None].expand(-1, SALIENT_ROWS, -1)) * mine[:, None]
    salient.copy_(chosen.flatten(0, 1)[: len(salient)])


def read(shape: Shape, buffer: Tensor) -> PackedDelta:
    """Undo `write`; where there was padding, channel 0 is a salient one of weight 0."""
    parts = shape.views(buffer)
    codes = torch.zeros(shape.rows, shape.in_features, dtype=torch.uint8, device=buffer.device)
    for plane in range(shape.planes[0]):
        codes |= _straight(parts["two"][plane], 2, shape.in_features) << (2 * plane)
    if shape.planes[1]:
        codes |= _straight(parts["one"][0], 1, shape.in_features) << (2 * shape.planes[0])
    channels = parts["index"].unique()
    weights = parts["salient"].new_zeros(shape.rows, len(channels))
    for tile, own in enumerate(parts["salient"].split(SALIENT_ROWS)):
        first, places = tile * SALIENT_ROWS, torch.searchsorted(channels, parts["index"][tile])
        weights[first : first + len(own)].index_add_(1, places, own)  # padding adds 0 to channel 0
    return PackedDelta(
        packed=pack(codes, shape.bits),
        scale=parts["scale"].T.contiguous(),
        salient_index=channels,
        salient_weight=weights,
        bits=shape.bits,
        group_size=shape.group or None,
        in_features=shape.in_features,
    )


def _blocks(in_features: int, bits: int) -> int:
    return -(-in_features // (WORDS * 32 // bits))


def _interleave(codes: Tensor, bits: int) -> Tensor:
    """[rows, in_features] uint8 -> [blocks, rows, 16] int32."""
    rows, width = codes.shape
    per_word, blocks = 32 // bits, _blocks(width, bits)
    padded = torch.nn.functional.pad(codes, (0, blocks * WORDS * per_word - width))
    padded = padded.view(rows, blocks, per_word, WORDS)
    words = torch.zeros(rows, blocks, WORDS, dtype=torch.int32, device=codes.device)
    for d in range(per_word):
        words |= padded[:, :, d].int() << (bits * d)
    return words.transpose(0, 1)


def _transpose(packed: Tensor) -> Tensor:
    """[rows, words] int32 of 2-bit codes -> [blocks, rows, 16] int32, as `_interleave` lays out the codes in them.

    Code d of a block's word j becomes code j of its word d. Halves are swapped, then quarters and so on: 4 steps over
    words instead of 16 over codes, each a byte. A GPU that lays out an expert also computes others' steps.
    """
    rows, count = packed.shape
    blocks = -(-count // WORDS)
    words = packed.new_zeros(rows, blocks * WORDS)
    words[:, :count] = packed
    for half, kept in ((8, 0x0000FFFF), (4, 0x00FF00FF), (2, 0x0F0F0F0F), (1, 0x33333333)):
        first, second = words.view(rows, blocks * WORDS // (2 * half), 2, half).unbind(2)
        changed = ((first >> 2 * half) ^ second) & kept
        second ^= changed
        first ^= changed << 2 * half
    return words.view(rows, blocks, WORDS).transpose(0, 1)


def _straight(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Undo `_interleave`."""
    rows = words.shape[1]
    codes = torch.stack([words >> (bits * d) & (2**bits - 1) for d in range(32 // bits)], dim=2)
    return codes.to(torch.uint8).transpose(0, 1).reshape(rows, -1)[:, :in_features]


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

    @classmethod
    def over(cls, variants: Iterable["Variant"]) -> "Variant":
        """What the deltas of several layers of one group size fit."""
        two, one, groups, salient = zip(*variants, strict=True)
        return cls(max(two), any(one), max(groups), max(salient))


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

    @classmethod
    def empty(cls, rows: int, in_features: int, device: torch.device | str) -> "SlotLinear":
        """A layer that no expert changes: without slots."""
        arena = torch.zeros(_UNIT, dtype=torch.uint8, device=device)
        table = torch.zeros(0, FIELDS, dtype=torch.int64, device=device)
        return cls.over(arena, table, rows, in_features, Variant(0, False, 0, 0))

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

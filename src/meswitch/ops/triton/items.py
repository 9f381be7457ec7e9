"""How kernels cut a layer into programs: by its shape and a step's buckets, as measured on an H100.

And what the decode kernel and the fused one share: constants, and the tensors that say where deltas lie.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from meswitch.ops.codes import GROUP
from meswitch.ops.layout import SlotLinear, Variant
from meswitch.ops.routing import MAX_TOKENS, PIECE, Routing
from meswitch.ops.triton import INTERPRET

_T = TypeVar("_T")
MOST_PIECES = 2 * MAX_TOKENS  # more of them choose no other items
_PROGRAMS = 132 * 6  # enough for every multiprocessor of an H100 to have its share of loads in flight
_LEAST_CHANNELS = 1024  # of one program of the decode kernel: less does not pay for its start
_LEAST_OF_ITEM = 512  # channels of an item of the fused kernel
_FEW_WAVES = 3  # of a launch whose last programs are split: in more, those that are left over weigh little
_TAIL_SPLIT = 4
_WIDE_ROWS, BROAD_ROWS, _MORE_ROWS, _LONG_CHANNELS = 20480, 8192, 5120, 8192  # more than these
_NARROW_CHANNELS, _SLIM_ROWS = 4096, 4096  # fewer than these


class _Items(NamedTuple):
    """Channels, rows and stages of a base item; parts of a base tile; parts of a delta tile; the rest as in
    `FusedConfig`.
    """

    channels: int
    rows: int
    stages: int
    parts: int
    splits: int
    before: float = 1.0
    every: int = 1


# What `benchmarks/kernels/sweep.py` found best on an H100, by the most tokens and then the likely pieces of a step:
# for linears of few rows, of more, of long rows, of so many rows that they fill the chip unsplit; and, as small models
# have them or parts of a model on several GPUs, of short rows, of very few rows, of many rows but not that many.
_Table = dict[int, dict[int, _Items]]
_FEW: _Table = {
    16: {
        2: _Items(128, 64, 3, 3, 4),
        6: _Items(128, 64, 2, 4, 4, 0.5),
        8: _Items(64, 128, 3, 3, 2),
        12: _Items(64, 64, 3, 2, 2, 0.5),
        MOST_PIECES: _Items(128, 64, 2, 2, 1),
    },
    32: {
        6: _Items(128, 64, 3, 2, 2),
        12: _Items(64, 64, 3, 2, 1),
        MOST_PIECES: _Items(128, 64, 2, 2, 1),
    },
    64: {MOST_PIECES: _Items(128, 64, 2, 4, 2, 0.5)},
}
_MORE: _Table = {
    16: {
        1: _Items(128, 64, 3, 2, 2),
        2: _Items(128, 64, 3, 2, 2, 0.5),
        6: _Items(128, 64, 2, 3, 2, 0.5),
        8: _Items(128, 64, 3, 1, 1),
        12: _Items(128, 64, 3, 2, 1),
        MOST_PIECES: _Items(128, 64, 2, 4, 1),
    },
    32: {
        6: _Items(128, 64, 2, 2, 1, 0.0),
        8: _Items(128, 64, 3, 1, 1),
        12: _Items(128, 64, 3, 2, 1),
        MOST_PIECES: _Items(128, 64, 2, 4, 1),
    },
    64: {MOST_PIECES: _Items(64, 64, 3, 2, 1)},
}
_LONG: _Table = {
    16: {
        1: _Items(128, 64, 3, 4, 4, 0.5),
        2: _Items(128, 64, 3, 3, 2),
        6: _Items(128, 64, 3, 2, 2, 0.5),
        8: _Items(128, 64, 3, 2, 2),
        12: _Items(64, 64, 4, 2, 2),
        MOST_PIECES: _Items(128, 64, 2, 2, 1),
    },
    32: {
        6: _Items(128, 64, 3, 2, 2, 0.5),
        8: _Items(128, 64, 2, 3, 2, 0.5),
        12: _Items(64, 64, 4, 2, 2),
        MOST_PIECES: _Items(128, 64, 3, 4, 1),
    },
    64: {MOST_PIECES: _Items(64, 64, 3, 3, 2)},
}
_WIDE: _Table = {
    16: {
        2: _Items(128, 64, 2, 2, 1),
        12: _Items(128, 64, 2, 1, 1, 0.75),
        MOST_PIECES: _Items(128, 64, 2, 1, 1),
    },
    32: {
        6: _Items(128, 64, 3, 1, 1, 0.0, 3),
        12: _Items(128, 64, 2, 1, 1, 0.75),
        MOST_PIECES: _Items(128, 64, 2, 1, 1),
    },
    64: {MOST_PIECES: _Items(128, 64, 2, 1, 1, 0.75)},
}
_NARROW: _Table = {
    16: {
        2: _Items(64, 128, 3, 4, 4, 0.5),
        8: _Items(64, 128, 3, 3, 2),
        MOST_PIECES: _Items(128, 64, 2, 2, 1),
    },
    32: {
        6: _Items(64, 64, 3, 2, 2),
        12: _Items(64, 128, 3, 2, 1),
        MOST_PIECES: _Items(128, 64, 2, 2, 1),
    },
    64: _FEW[64],
}
_SLIM: _Table = {
    16: {
        6: _Items(128, 64, 3, 3, 4),
        8: _Items(64, 128, 3, 4, 2),
        MOST_PIECES: _Items(128, 64, 2, 2, 1),
    },
    32: {
        6: _Items(128, 64, 3, 3, 4),
        12: _Items(64, 64, 3, 3, 2),
        MOST_PIECES: _Items(128, 64, 2, 2, 1),
    },
    64: _FEW[64],
}
_BROAD: _Table = {
    16: {
        2: _Items(128, 64, 2, 2, 1, 0.5),
        6: _Items(128, 64, 2, 1, 1, 0.5),
        12: _Items(128, 64, 3, 1, 1),
        MOST_PIECES: _Items(128, 64, 2, 1, 1),
    },
    32: {
        6: _Items(128, 64, 2, 1, 1, 0.5),
        12: _Items(128, 64, 2, 2, 1),
        MOST_PIECES: _Items(128, 64, 2, 1, 1, 0.75),
    },
    64: _WIDE[64],
}
_MOST_BASE_ITEMS = 400  # of a linear of few rows: more are not worth their sums


@dataclass(frozen=True, slots=True)
class Config:
    """rows, tokens: of a tile. split: programs that share a tile's input channels, of all tiles but the first `whole`.
    warps, stages: Triton's. join: codes that are one dot.
    """

    rows: int
    tokens: int
    split: int
    warps: int = 2
    stages: int = 3
    whole: int = 0
    join: int = 1


def choose(rows: int, in_features: int, pieces: int, piece: int) -> Config:
    """Tiles from the layer's shape and the step's buckets, and from nothing else."""
    tile, warps, stages = (128, 2, 3) if piece <= 16 else (128, 4, 2)
    programs = math.ceil(rows / tile) * pieces
    split, whole = 1, 0
    while programs * split * 2 <= _PROGRAMS and in_features // (split * 2) >= _LEAST_CHANNELS:
        split *= 2
    waves, rest = divmod(programs, _PROGRAMS)
    if rest and 1 <= waves <= _FEW_WAVES and in_features >= _TAIL_SPLIT * _LEAST_CHANNELS:
        split, whole = _TAIL_SPLIT, waves * _PROGRAMS // pieces
    # with 205 registers there is room for two thirds of the programs, and fewer than half have none to hide behind
    join = 4 if piece <= PIECE and _PROGRAMS // 2 < programs * split <= _PROGRAMS * 2 // 3 else 1
    return Config(tile, piece, split, warps, stages, whole, join)


@dataclass(frozen=True, slots=True)
class FusedConfig:
    """delta: the delta items. columns: all tokens of a step, padded. base_split: base items that share a tile's input
    channels. base_channels, base_rows, base_stages: of a base item and its blocks. before: share of the delta items
    that start before the base's. every: after them, the distance from one base item to the next.
    """

    delta: Config
    columns: int
    base_split: int
    base_channels: int = 128
    base_rows: int = 64
    base_stages: int = 3
    before: float = 1.0
    every: int = 1


def choose_fused(
    rows: int, in_features: int, pieces: int, columns: int, planes: int = 1, codes: torch.dtype | None = None
) -> FusedConfig:
    """Items from the layer's shape and the step's buckets, and from nothing else: as the tables above have it.

    Args:
        planes: of the deltas, see `Variant.planes`. The items of more than one take so long that they start first.
        codes: dtype of the base's `Codes`. Of pairs of 4 bits a block is one group of channels, or two.
    """
    table = _table_of(rows, in_features)
    items = _for(min(pieces, MOST_PIECES), _for(columns, table))
    if planes > 1:
        items = items._replace(channels=128, rows=64, stages=2, before=1.0, every=1)
    if codes == torch.uint8:
        two = columns <= 16 and in_features % (2 * GROUP) == 0  # with more columns their sums find no registers
        items = items._replace(channels=2 * GROUP if two else GROUP, rows=64)
    channels, base_rows, stages, parts, splits, before, every = items
    parts = min(parts, max(1, in_features // _LEAST_OF_ITEM))
    if rows <= BROAD_ROWS:
        parts = min(parts, max(1, _MOST_BASE_ITEMS // math.ceil(rows / base_rows)))
    while splits > 1 and in_features // splits < _LEAST_OF_ITEM:
        splits //= 2
    return FusedConfig(Config(128, PIECE, splits), columns, parts, channels, base_rows, stages, before, every)


def _table_of(rows: int, in_features: int) -> _Table:
    if rows > BROAD_ROWS:
        return _WIDE if rows > _WIDE_ROWS else _BROAD
    if in_features < _NARROW_CHANNELS:
        return _NARROW
    if rows < _SLIM_ROWS:
        return _SLIM
    if in_features > _LONG_CHANNELS:
        return _LONG
    return _MORE if rows > _MORE_ROWS else _FEW


def _for(count: int, table: dict[int, _T]) -> _T:
    """The entry of the smallest key that is not below."""
    return next(entry for most, entry in table.items() if count <= most)


@dataclass(frozen=True, slots=True)
class MergeTile:
    """rows of a tile of 256 channels, the warps that work on it, and the most registers of a thread if it matters."""

    rows: int
    warps: int
    registers: int | None = None


MERGE_TILES = {  # by the experts of a launch
    1: MergeTile(16, 8),
    2: MergeTile(16, 8, 80),
    3: MergeTile(16, 8, 80),
    4: MergeTile(16, 8, 80),
}


@functools.cache
def _early() -> dict[str, Any]:
    """Whether kernels start while the one before them still runs: Hopper's programmatic dependent launch."""
    early = not INTERPRET and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def shared_constants(config: Config, rows: int, in_features: int, variant: Variant) -> dict[str, Any]:
    """What the decode kernel and the fused one are compiled for."""
    return {
        "TWO": variant.two > 0,
        "ONE": variant.one,
        "SALIENT": variant.salient > 0,
        "GROUP": variant.group,
        "EVEN_K": in_features % 512 == 0,
        "EVEN_N": rows % config.rows == 0,
        "INTERPRET": INTERPRET,
        "BN": config.rows,
        "MT": config.tokens,
        "STAGES": config.stages,
        "num_warps": config.warps,
        **_early(),
    }


def places(layer: SlotLinear, routing: Routing) -> tuple[Tensor, ...]:
    """What tells a kernel where deltas lie and whose tokens are where."""
    return layer.arena.view(torch.int32), layer.table, routing.slots, routing.starts, routing.order

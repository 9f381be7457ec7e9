"""Launching the decode kernels: their tiles by shape and bucket, their scratch memory."""

import functools
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meswitch.ops.routing import MAX_TOKENS, PIECE, Routing, bucket
from meswitch.ops.slots import SlotLinear, Variant
from meswitch.ops.triton_decode import decode_kernel
from meswitch.ops.triton_fused import fused_kernel

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # no inline assembly there
MOST_PIECES = 2 * MAX_TOKENS  # more of them choose no other items
_PROGRAMS = 132 * 6  # enough for every multiprocessor of an H100 to have its share of loads in flight
_LEAST_CHANNELS = 1024  # of one program: less does not pay for its start
_FEW_WAVES = 3  # of a launch whose last programs are split: in more, those that are left over weigh little
_TAIL_SPLIT = 4
_WIDE = 240  # tiles of 64 rows: a linear of more fills the chip without being split

# What `benchmarks/ops_sweep.py` found best on an H100, by the most likely pieces of a step. A narrow linear: channels,
# rows and stages of a base item, about how many of them, about how many delta items at least.
_NARROW = {
    1: (128, 64, 3, 168, 90),
    2: (128, 64, 3, 168, 130),
    6: (128, 64, 3, 150, 230),
    8: (128, 64, 3, 96, 320),
    12: (64, 64, 4, 100, 450),
    MOST_PIECES: (128, 64, 3, 264, 500),
}
_NARROW_64_TOKENS = {MOST_PIECES: (64, 64, 3, 162, 320)}
# A wide linear: channels, rows and stages of a base item, in how many parts, what share of the deltas starts before.
_WIDE_16_TOKENS = {2: (128, 64, 2, 2, 1.0), 6: (128, 64, 2, 1, 0.75), MOST_PIECES: (128, 64, 3, 1, 1.0)}
_WIDE_32_TOKENS = {12: (128, 64, 2, 1, 0.75), MOST_PIECES: (128, 64, 2, 1, 1.0)}
_WIDE_64_TOKENS = {MOST_PIECES: (64, 64, 3, 2, 0.75)}


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
    join = 4 if piece <= PIECE and programs * split <= _PROGRAMS * 2 // 3 else 1
    return Config(tile, piece, split, warps, stages, whole, join)


@dataclass(frozen=True, slots=True)
class FusedConfig:
    """delta: the delta items. columns: all tokens of a step, padded. base_split: base items that share a tile's input
    channels. base_channels, base_rows, base_stages: of a base item and its blocks. before: share of the delta items
    that start before the base's.
    """

    delta: Config
    columns: int
    base_split: int
    base_channels: int = 128
    base_rows: int = 64
    base_stages: int = 3
    before: float = 1.0


def choose_fused(rows: int, in_features: int, pieces: int, columns: int) -> FusedConfig:
    """Items from the layer's shape and the step's buckets, and from nothing else: as the tables above have it."""
    pieces = min(pieces, MOST_PIECES)
    if math.ceil(rows / 64) > _WIDE:
        wide = _WIDE_16_TOKENS if columns <= 16 else _WIDE_32_TOKENS if columns <= 32 else _WIDE_64_TOKENS
        channels, base_rows, stages, parts, before = _for(pieces, wide)
        parts = min(parts, max(1, in_features // 512))
        return FusedConfig(Config(128, PIECE, 1), columns, parts, channels, base_rows, stages, before)
    table = _NARROW if columns <= 32 else _NARROW_64_TOKENS
    channels, base_rows, stages, base_items, delta_items = _for(pieces, table)
    # an item of a longer row takes longer, and one that starts late is the step's tail
    base_split = round(base_items * (in_features / 4096) ** 0.25 / math.ceil(rows / base_rows))
    base_split, split = max(1, min(4, base_split, in_features // 512)), 1
    while in_features // (split * 2) >= _LEAST_CHANNELS and math.ceil(rows / 128) * pieces * split < delta_items:
        split *= 2
    return FusedConfig(Config(128, PIECE, split), columns, base_split, channels, base_rows, stages)


def _for(pieces: int, table: dict[int, tuple[Any, ...]]) -> tuple[Any, ...]:
    """The entry of the smallest key that is not below."""
    return next(entry for most, entry in table.items() if pieces <= most)


@functools.cache
def _early() -> dict[str, Any]:
    """Whether kernels start while the one before them still runs: Hopper's programmatic dependent launch."""
    early = not INTERPRET and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def constants(config: Config, rows: int, in_features: int, variant: Variant) -> dict[str, Any]:
    """What the kernel is compiled for."""
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
        "SPLIT": config.split,
        "STAGES": config.stages,
        "JOIN": config.join,
        "WHOLE": config.whole > 0,
        "num_warps": config.warps,
        **_early(),
    }


def fused_constants(
    config: FusedConfig, rows: int, in_features: int, variant: Variant, bias: bool, again: bool = False
) -> dict[str, Any]:
    """What the fused kernel is compiled for. again: a program may take several pieces."""
    shared = constants(config.delta, rows, in_features, variant)
    del shared["SPLIT"], shared["JOIN"], shared["WHOLE"]
    return shared | {
        "BIAS": bias,
        "BASE_BN": config.base_rows,
        "BASE_BK": config.base_channels,
        "M": config.columns,
        "PARTS": config.base_split + config.delta.split,
        "COLUMNS": min(config.columns, 8 * config.delta.warps),
        "BASE_STAGES": config.base_stages,
        "AGAIN": again,
        "maxnreg": 200 if variant.one else 168,  # adding up at the end must not cost the loops their neighbours
    }


def decode(y: Tensor, x: Tensor, layer: SlotLinear, routing: Routing, config: Config | None = None) -> None:
    """`y += x D^T` in one launch; see `linear.expert_linear` for the shapes."""
    rows, width, pieces = layer.rows, layer.in_features, routing.slots.numel()
    layer = layer.for_pieces(pieces)
    config = config or choose(rows, width, routing.likely, routing.piece)
    tiles = math.ceil(rows / config.rows)
    split_tiles = tiles - config.whole
    if config.split > 1:
        size = split_tiles * pieces * config.split * config.rows * config.tokens
        work = torch.empty(size, dtype=torch.float32, device=x.device)
    else:
        work = routing.starts  # not used
    grid = (tiles, config.split, pieces)
    if config.whole:
        grid = ((config.whole + split_tiles * config.split) * pieces, 1, 1)
    decode_kernel[grid](
        *(x, y, *_tables(layer, routing), work, layer.arrived, x.stride(0), y.stride(0), rows, width),
        *(pieces, config.whole),
        **constants(config, rows, width, layer.variant),
    )


def fused(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer: SlotLinear,
    routing: Routing,
    config: FusedConfig | None = None,
) -> None:
    """`y = x W^T + x D^T` in one launch; see `linear.fused_linear` for the shapes."""
    rows, width, pieces, tokens = layer.rows, layer.in_features, routing.slots.numel(), len(x)
    wave = min(routing.likely, pieces)
    config = config or choose_fused(rows, width, routing.likely, bucket(tokens, least=8))
    tiles = math.ceil(rows / config.delta.rows)
    parts = config.base_split, config.delta.split
    base_items = tiles * (config.delta.rows // config.base_rows) * config.base_split
    delta_items = tiles * wave * config.delta.split
    size = tiles * sum(parts) * config.delta.rows * config.columns
    work = torch.empty(size, dtype=torch.float32, device=x.device)
    strides = x.stride(0), y.stride(0), weight.stride(0)
    fused_kernel[(base_items + delta_items,)](
        *(x, y, weight, y if bias is None else bias, *_tables(layer, routing), work, layer.arrived),
        *(*strides, rows, width, tokens, pieces, wave, *parts, round(config.before * delta_items)),
        **fused_constants(config, rows, width, layer.variant, bias is not None, pieces > wave),
    )


def _tables(layer: SlotLinear, routing: Routing) -> tuple[Tensor, ...]:
    """What tells a kernel where deltas lie and whose tokens are where."""
    return layer.arena.view(torch.int32), layer.table, routing.slots, routing.starts, routing.order

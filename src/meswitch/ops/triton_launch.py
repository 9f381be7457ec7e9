"""Launching the decode kernels: their tiles by shape and bucket, their scratch memory."""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meswitch.ops.routing import Routing, bucket
from meswitch.ops.slots import SlotLinear, Variant
from meswitch.ops.triton_decode import decode_kernel
from meswitch.ops.triton_fused import fused_kernel

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # no inline assembly there
_PROGRAMS = 132 * 6  # enough for every multiprocessor of an H100 to have its share of loads in flight
_BASE_CHANNELS = 64  # of a base item's block: 128 bytes of a row
_LEAST_CHANNELS = 1024  # of one program: less does not pay for its start
_MOST_CHANNELS = 4096  # of one delta item beside base items: a longer one that starts late is the step's tail


@dataclass(frozen=True, slots=True)
class Config:
    """rows, tokens: of a tile. split: programs that share a tile's input channels. warps, stages: Triton's."""

    rows: int
    tokens: int
    split: int
    warps: int = 2
    stages: int = 3


def choose(rows: int, in_features: int, experts: int, tokens: int) -> Config:
    """Tiles from the layer's shape and the step's buckets, and from nothing else."""
    tile, warps, stages = {8: (128, 2, 3), 16: (128, 2, 3), 32: (128, 4, 3)}.get(tokens, (128, 4, 2))
    programs = math.ceil(rows / tile) * experts
    split = 1
    while programs * split * 2 <= _PROGRAMS and in_features // (split * 2) >= _LEAST_CHANNELS:
        split *= 2
    return Config(tile, tokens, split, warps, stages)


@dataclass(frozen=True, slots=True)
class FusedConfig:
    """delta: the delta items. columns: all tokens of a step, padded. base_rows, base_stages: of the base items.

    base_split: base items that share a tile's input channels. deltas_first: their items start before the base's.
    """

    delta: Config
    columns: int
    base_rows: int
    base_split: int
    base_stages: int
    deltas_first: bool = False


def choose_fused(rows: int, in_features: int, experts: int, tokens: int, columns: int) -> FusedConfig:
    """Items from the layer's shape and the step's buckets, and from nothing else.

    Programs of 2 warps fit six times on a multiprocessor, of 4 warps three times. Base items take a third of those
    places, so that deltas stream beside them from the start, and none is shorter than pays for its sums. Where the
    base's tiles alone are more, deltas start first.
    """
    warps, stages = (2, 3) if tokens <= 16 else (4, 3 if tokens <= 32 else 2)
    places = _PROGRAMS if warps == 2 else _PROGRAMS // 2
    base_rows, base_stages = (64, 4 if columns <= 16 else 3) if warps == 2 else (128, 3)
    base_tiles = math.ceil(rows / 128) * (128 // base_rows)
    least = 512 if columns <= 16 else 1024
    base_split = max(1, min(places // 3 // base_tiles, in_features // least))
    programs, split = math.ceil(rows / 128) * experts, 1
    while in_features // (split * 2) >= _LEAST_CHANNELS and (
        programs * split * 2 <= places * 2 // 3 or in_features // split > _MOST_CHANNELS
    ):
        split *= 2
    delta = Config(128, tokens, split, warps, stages)
    return FusedConfig(delta, columns, base_rows, base_split, base_stages, deltas_first=base_split == 1)


def constants(config: Config, rows: int, in_features: int, variant: Variant) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "TWO": variant.two,
        "ONE": variant.one,
        "SALIENT": variant.salient,
        "GROUP": variant.group,
        "EVEN_K": in_features % 512 == 0,
        "EVEN_N": rows % config.rows == 0,
        "INTERPRET": INTERPRET,
        "BN": config.rows,
        "MT": config.tokens,
        "SPLIT": config.split,
        "STAGES": config.stages,
        "num_warps": config.warps,
    }


def _registers(tokens: int, one: bool) -> int:
    """A bound of registers a thread: adding up at the end must not cost the loops their neighbours.

    That is 6 programs of 2 warps or 3 of 4 a multiprocessor, and 5 or 2 where the loops themselves need more.
    """
    if tokens >= 64:
        return 248
    return 200 if tokens == 16 or one else 168


def fused_constants(config: FusedConfig, rows: int, in_features: int, variant: Variant, bias: bool) -> dict[str, Any]:
    """What the fused kernel is compiled for."""
    shared = constants(config.delta, rows, in_features, variant)
    del shared["SPLIT"]
    return shared | {
        "BIAS": bias,
        "BASE_BN": config.base_rows,
        "BASE_BK": _BASE_CHANNELS,
        "M": config.columns,
        "PARTS": bucket(config.base_split + config.delta.split),
        "COLUMNS": min(config.columns, 8 * config.delta.warps),
        "BASE_STAGES": config.base_stages,
        "maxnreg": _registers(config.delta.tokens, variant.one),
    }


def decode(y: Tensor, x: Tensor, layer: SlotLinear, routing: Routing, config: Config | None = None) -> None:
    """`y += x D^T` in one launch; see `linear.expert_linear` for the shapes."""
    rows, width, experts = layer.rows, layer.in_features, routing.slots.numel()
    config = config or choose(rows, width, experts, routing.max_tokens)
    tiles = math.ceil(rows / config.rows)
    if config.split > 1:
        size = tiles * experts * config.split * config.rows * config.tokens
        work = torch.empty(size, dtype=torch.float32, device=x.device)
    else:
        work = routing.starts  # not used
    decode_kernel[(tiles, config.split, experts)](
        *(x, y, *_tables(layer, routing), work, layer.arrived, x.stride(0), y.stride(0), rows, width),
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
    rows, width, experts, tokens = layer.rows, layer.in_features, routing.slots.numel(), len(x)
    config = config or choose_fused(rows, width, experts, routing.max_tokens, bucket(tokens, least=8))
    tiles = math.ceil(rows / config.delta.rows)
    parts = config.base_split, config.delta.split
    base_items = tiles * (config.delta.rows // config.base_rows) * config.base_split
    size = tiles * sum(parts) * config.delta.rows * config.columns
    work = torch.empty(size, dtype=torch.float32, device=x.device)
    strides = x.stride(0), y.stride(0), weight.stride(0)
    fused_kernel[(base_items + tiles * experts * config.delta.split,)](
        *(x, y, weight, y if bias is None else bias, *_tables(layer, routing), work, layer.arrived),
        *(*strides, rows, width, tokens, experts, *parts, base_items if config.deltas_first else 0),
        **fused_constants(config, rows, width, layer.variant, bias is not None),
    )


def _tables(layer: SlotLinear, routing: Routing) -> tuple[Tensor, ...]:
    """What tells a kernel where deltas lie and whose tokens are where."""
    return layer.arena.view(torch.int32), layer.table, routing.slots, routing.starts, routing.order

"""Launching the decode kernels: their tiles by shape and bucket, their scratch memory."""

import functools
import math
import os
from typing import Any

import torch
from torch import Tensor

from meswitch.ops.routing import Routing, bucket
from meswitch.ops.slots import SlotLinear, Variant
from meswitch.ops.triton.decode import decode_kernel
from meswitch.ops.triton.fused import fused_kernel
from meswitch.ops.triton.items import Config, FusedConfig, choose, choose_fused

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # no inline assembly there


@functools.cache
def _early() -> dict[str, Any]:
    """Whether kernels start while the one before them still runs: Hopper's programmatic dependent launch."""
    early = not INTERPRET and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def constants(config: Config, rows: int, in_features: int, variant: Variant) -> dict[str, Any]:
    """What the decode kernel is compiled for."""
    own = {"SPLIT": config.split, "JOIN": config.join, "WHOLE": config.whole > 0}
    return _shared(config, rows, in_features, variant) | own


def _shared(config: Config, rows: int, in_features: int, variant: Variant) -> dict[str, Any]:
    """What both kernels are compiled for."""
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


def fused_constants(
    config: FusedConfig, rows: int, in_features: int, variant: Variant, bias: bool, again: bool = False
) -> dict[str, Any]:
    """What the fused kernel is compiled for. again: a program may take several pieces."""
    return _shared(config.delta, rows, in_features, variant) | {
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
    if config.split > 1:
        size = tiles * pieces * config.split * config.rows * config.tokens
        work = torch.empty(size, dtype=torch.float32, device=x.device)
    else:
        work = routing.starts  # not used
    grid = (tiles, config.split, pieces)
    if config.whole:
        grid = ((config.whole + (tiles - config.whole) * config.split) * pieces, 1, 1)
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
    config = config or choose_fused(rows, width, routing.likely, bucket(tokens, least=8), layer.variant.planes)
    tiles = math.ceil(rows / config.delta.rows)
    parts = config.base_split, config.delta.split
    base_items = tiles * (config.delta.rows // config.base_rows) * config.base_split
    delta_items = tiles * wave * config.delta.split
    size = tiles * sum(parts) * config.delta.rows * config.columns
    work = torch.empty(size, dtype=torch.float32, device=x.device)
    before = round(config.before * delta_items)
    every = min(config.every, (base_items + delta_items - before) // base_items)
    strides = x.stride(0), y.stride(0), weight.stride(0)
    fused_kernel[(base_items + delta_items,)](
        *(x, y, weight, y if bias is None else bias, *_tables(layer, routing), work, layer.arrived),
        *(*strides, rows, width, tokens, pieces, wave, *parts, before, every),
        **fused_constants(config, rows, width, layer.variant, bias is not None, pieces > wave),
    )


def _tables(layer: SlotLinear, routing: Routing) -> tuple[Tensor, ...]:
    """What tells a kernel where deltas lie and whose tokens are where."""
    return layer.arena.view(torch.int32), layer.table, routing.slots, routing.starts, routing.order

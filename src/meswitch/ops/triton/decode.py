"""Decode on a GPU: the deltas of all experts of a step in one launch.

A tile's programs share its input channels, and the last of them adds up. Where a launch fills the chip once and a bit
(WHOLE), the first `whole` tiles have one program each and the others follow, which evens out its end.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meswitch.ops.layout import SlotLinear, Variant
from meswitch.ops.routing import Routing
from meswitch.ops.triton.delta import delta_tile
from meswitch.ops.triton.items import Config, choose, places, shared_constants


@triton.jit(do_not_specialize=["pieces", "whole"])
def decode_kernel(
    x,
    y,
    arena,
    table,
    slots,
    starts,
    order,
    work,
    arrived,
    stride_x,
    stride_y,
    N,
    K,
    pieces,
    whole,
    TWO: tl.constexpr,
    ONE: tl.constexpr,
    SALIENT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    INTERPRET: tl.constexpr,
    BN: tl.constexpr,
    MT: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    JOIN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_wait()  # in every program: one that ended before would let the kernel after this one start
    if WHOLE:
        tiles, program = tl.cdiv(N, BN), tl.program_id(0)
        place = program - whole * pieces
        if place < 0:
            tile, part, parts, e = program % whole, 0, 1, program // whole
        else:
            rest = tiles - whole
            tile, part, parts, e = whole + place % rest, place // rest % SPLIT, SPLIT, place // rest // SPLIT
    else:
        tiles, parts = tl.num_programs(0), SPLIT
        tile, part, e = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + e)
    if slot < 0:
        return
    row = table + slot.to(tl.int64) * 8
    if tl.load(row) + tl.load(row + 1) + tl.load(row + 7) == 0:
        return
    first, last = tl.load(starts + e), tl.load(starts + e + 1)
    if first == last:
        return
    m = tl.arange(0, MT)
    token = tl.load(order + tl.minimum(first + m, last - 1))
    x_rows = x + token.to(tl.int64) * stride_x
    acc = delta_tile(
        *(x_rows, arena, row, tile, part, parts, N, K),
        *(TWO, ONE, SALIENT, GROUP, EVEN_K, EVEN_N, INTERPRET, BN, MT, STAGES, JOIN),
    )
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT > 1:
        cell = tile + e * tiles
        offsets = tl.arange(0, MT)[None, :] * BN + tl.arange(0, BN)[:, None]
        home = work + cell.to(tl.int64) * (SPLIT * BN * MT)
        tl.store(home + part * (BN * MT) + offsets, acc)
        tl.debug_barrier()
        if tl.atomic_add(arrived + cell, 1, sem="acq_rel") < parts - 1:
            return
        acc = tl.zeros([BN, MT], tl.float32)
        for other in tl.static_range(SPLIT):
            if WHOLE:
                acc += tl.load(home + other * (BN * MT) + offsets, mask=other < parts, other=0.0, cache_modifier=".cg")
            else:
                acc += tl.load(home + other * (BN * MT) + offsets, cache_modifier=".cg")
        tl.store(arrived + cell, 0)
    n = tile * BN + tl.arange(0, BN)
    out = y + token.to(tl.int64)[None, :] * stride_y + n[:, None]
    mask = ((m < last - first)[None, :]) & (n < N)[:, None]
    before = tl.load(out, mask=mask, other=0.0)
    tl.store(out, (before.to(tl.float32) + acc).to(before.dtype), mask=mask)


def decode_constants(config: Config, rows: int, in_features: int, variant: Variant) -> dict[str, Any]:
    """What the decode kernel is compiled for."""
    own = {"SPLIT": config.split, "JOIN": config.join, "WHOLE": config.whole > 0}
    return shared_constants(config, rows, in_features, variant) | own


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
        *(x, y, *places(layer, routing), work, layer.arrived, x.stride(0), y.stride(0), rows, width),
        *(pieces, config.whole),
        **decode_constants(config, rows, width, layer.variant),
    )

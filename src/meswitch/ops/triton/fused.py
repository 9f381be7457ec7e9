"""Decode on a GPU: the base products of linears with one input and the deltas of all experts, in one launch.

The grid is a list of work items. Those of the base are a tile of rows times a part of the input channels for all
tokens, those of the deltas a tile of rows times a part of one expert's channels for its tokens: a piece of the routing,
and those that are `wave` further on where it has more than a step of its size has as a rule. A base item reads much and
computes little, a delta item the reverse, and a multiprocessor holds some of both. Every item leaves its partial sums
in scratch memory; the one that is the last of a tile of rows adds them up in a fixed order and writes y. From then on
the next kernel may start, and waits for all of this one before it reads anything.

Columns are not tokens but places in the routing's order, so that an expert's tokens are neighbours. The tiles of
several linears, such as those of a block's queries, keys and values, are counted one after another; each reads its own
linear's weights and writes its own output.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meswitch.ops.layout import SlotLinear, Variant
from meswitch.ops.routing import Routing, bucket
from meswitch.ops.triton.codes import FP8, GROUP, HALF, KINDS, NO_CODES, PAIRS, nibbles, numbers
from meswitch.ops.triton.delta import bound, delta_tile
from meswitch.ops.triton.items import FusedConfig, choose_fused, places, shared_constants


@triton.jit
def _base_tile(
    x_rows,
    weight,
    stride_weight,
    n,
    start,
    end,
    N,
    K,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    M: tl.constexpr,
    STAGES: tl.constexpr,
    CODES: tl.constexpr,
):
    """[BN, M] float32: rows n of the base, blocks of BK channels from start to end.

    CODES: the weight is bytes, of int8 or FP8; the sums are those of the codes then, without the rows' scales.
    """
    weight_rows = weight + tl.minimum(n, N - 1).to(tl.int64) * stride_weight  # rows beyond the last are not stored
    acc = tl.zeros([BN, M], tl.float32)
    for block in tl.range(bound(start, INTERPRET), bound(end, INTERPRET), num_stages=STAGES):
        k = block * BK + tl.arange(0, BK)
        if EVEN_K:
            w = tl.load(weight_rows[:, None] + k[None, :])
            x = tl.load(x_rows[None, :] + k[:, None])
        else:
            w = tl.load(weight_rows[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
            x = tl.load(x_rows[None, :] + k[:, None], mask=(k < K)[:, None], other=0.0)
        if CODES != NO_CODES:
            w = numbers(w, CODES == FP8, x_rows.dtype.element_ty == tl.bfloat16, INTERPRET)
        acc = _dot(w, x, acc, INTERPRET)
    return acc


@triton.jit
def _dot(w, x, acc, INTERPRET: tl.constexpr):
    if INTERPRET:
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc)
    else:
        return tl.dot(w, x, acc)


@triton.jit
def _pairs_tile(
    x_rows,
    weight,
    scale,
    stride_weight,
    n,
    start,
    end,
    N,
    INTERPRET: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `_base_tile`, of bytes that are two codes of 4 bits each, with the groups' scales: see `ops.codes`."""
    BF16: tl.constexpr = x_rows.dtype.element_ty == tl.bfloat16
    row = tl.minimum(n, N - 1)
    weight_rows = weight + row.to(tl.int64) * stride_weight
    b = tl.arange(0, HALF)
    acc = tl.zeros([BN, M], tl.float32)
    for block in tl.range(bound(start, INTERPRET), bound(end, INTERPRET), num_stages=STAGES):
        for g in tl.static_range(BK // GROUP):
            group = block * (BK // GROUP) + g
            pairs = tl.load(weight_rows[:, None] + (group * HALF + b)[None, :])
            low_x = tl.load(x_rows[None, :] + (group * GROUP + b)[:, None])
            high_x = tl.load(x_rows[None, :] + (group * GROUP + HALF + b)[:, None])
            part = _dot(nibbles(pairs, False, BF16, INTERPRET), low_x, tl.zeros([BN, M], tl.float32), INTERPRET)
            part = _dot(nibbles(pairs, True, BF16, INTERPRET), high_x, part, INTERPRET)
            acc += part * tl.load(scale + group.to(tl.int64) * N + row)[:, None]
    return acc


@triton.jit
def _base_item(
    x,
    weight,
    scale,
    order,
    home,
    stride_x,
    stride_weight,
    tile,
    half,
    part,
    parts,
    tokens,
    N,
    K,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
    BN: tl.constexpr,
    BASE_BN: tl.constexpr,
    BASE_BK: tl.constexpr,
    M: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    CODES: tl.constexpr,
):
    place = half * BASE_BN + tl.arange(0, BASE_BN)
    n = tile * BN + place
    blocks = tl.cdiv(K, BASE_BK)
    start, end = part * blocks // parts, (part + 1) * blocks // parts
    if EARLY:
        tl.extra.cuda.gdc_wait()
    m = tl.arange(0, M)
    token = tl.load(order + tl.minimum(m, tokens - 1))
    x_rows = x + token.to(tl.int64) * stride_x
    if CODES == PAIRS:
        acc = _pairs_tile(
            *(x_rows, weight, scale, stride_weight, n, start, end, N, INTERPRET, BASE_BN, BASE_BK, M, STAGES)
        )
    else:
        acc = _base_tile(
            *(x_rows, weight, stride_weight, n, start, end, N, K, EVEN_K, INTERPRET, BASE_BN, BASE_BK, M, STAGES, CODES)
        )
        if CODES != NO_CODES:  # here, where no delta is in the sum
            acc *= tl.load(scale + tl.minimum(n, N - 1))[:, None]
    tl.store(home + m[None, :] * BN + place[:, None], acc)


@triton.jit
def _delta_item(
    x,
    arena,
    table,
    slots,
    starts,
    order,
    home,
    stride_x,
    tile,
    piece,
    part,
    parts,
    N,
    K,
    TWO: tl.constexpr,
    ONE: tl.constexpr,
    SALIENT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    INTERPRET: tl.constexpr,
    BN: tl.constexpr,
    MT: tl.constexpr,
    STAGES: tl.constexpr,
):
    slot = tl.load(slots + piece)
    first, last = tl.load(starts + piece), tl.load(starts + piece + 1)
    if (slot >= 0) & (first < last):
        place = tl.arange(0, BN)
        m = tl.arange(0, MT)
        token = tl.load(order + tl.minimum(first + m, last - 1))
        x_rows = x + token.to(tl.int64) * stride_x
        row = table + slot.to(tl.int64) * 8
        acc = delta_tile(
            *(x_rows, arena, row, tile, part, parts, N, K),
            *(TWO, ONE, SALIENT, GROUP, EVEN_K, EVEN_N, INTERPRET, BN, MT, STAGES),
        )
        tl.store(home + (first + m)[None, :] * BN + place[:, None], acc, mask=(m < last - first)[None, :])


@triton.jit
def _finish(
    y,
    bias,
    order,
    home,
    stride_y,
    tile,
    half,
    owned,
    tokens,
    base_parts,
    parts,
    N,
    BIAS: tl.constexpr,
    BN: tl.constexpr,
    BASE_BN: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up what the items of a part of a tile left; the places from `owned` on are the base's own tokens."""
    place = half * BASE_BN + tl.arange(0, BASE_BN)
    n = tile * BN + place
    for chunk in tl.static_range(M // COLUMNS):
        m = chunk * COLUMNS + tl.arange(0, COLUMNS)
        cells = home + m[None, :] * BN + place[:, None]
        acc = tl.zeros([BASE_BN, COLUMNS], tl.float32)
        for part in tl.static_range(PARTS):
            columns = tl.where(part < base_parts, tokens, tl.where(part < base_parts + parts, owned, 0))
            acc += tl.load(cells + part * (M * BN), mask=(m < columns)[None, :], other=0.0, cache_modifier=".cg")
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        token = tl.load(order + tl.minimum(m, tokens - 1))
        out = y + token.to(tl.int64)[None, :] * stride_y + n[:, None]
        tl.store(out, acc.to(y.dtype.element_ty), mask=(m < tokens)[None, :] & (n < N)[:, None])


@triton.jit
def _of_linear(values, linear, LINEARS: tl.constexpr):
    """The linear's own of a tuple that has one for each."""
    found = values[0]
    for i in tl.static_range(1, LINEARS):
        found = tl.where(linear >= i, values[i], found)
    return found


@triton.jit(do_not_specialize=["tokens", "pieces", "wave", "base_parts", "parts", "before", "every"])
def fused_kernel(
    x,
    ys,
    weights,
    scales,
    biases,
    arena,
    tables,
    slots,
    starts,
    order,
    work,
    arrivals,
    stride_x,
    strides_y,
    strides_weight,
    rows,
    K,
    tokens,
    pieces,
    wave,
    base_parts,
    parts,
    before,
    every,
    TWO: tl.constexpr,
    ONE: tl.constexpr,
    SALIENT: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    INTERPRET: tl.constexpr,
    BN: tl.constexpr,
    BASE_BN: tl.constexpr,
    BASE_BK: tl.constexpr,
    M: tl.constexpr,
    MT: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BASE_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    AGAIN: tl.constexpr,
    CODES: tl.constexpr,
    LINEARS: tl.constexpr,
):
    """Names in the plural are tuples of one for each linear."""
    HALVES: tl.constexpr = BN // BASE_BN
    program = tl.program_id(0)
    cells = base_parts + parts
    tiles = tl.cdiv(rows[0], BN)
    for i in tl.static_range(1, LINEARS):
        tiles += tl.cdiv(rows[i], BN)
    base_items = tiles * HALVES * base_parts
    after = program - before  # from there on every so many-th item is one of the base's, until there are no more
    base = after // every
    is_base = (after >= 0) & (after == base * every) & (base < base_items)
    delta = program - tl.where(after <= 0, 0, tl.minimum(base_items, (after + every - 1) // every))
    of_all = tl.where(is_base, base // (base_parts * HALVES), delta // (parts * wave))  # counted over all linears
    linear, tile = of_all * 0, of_all
    before_it = 0
    for i in tl.static_range(1, LINEARS):
        before_it += tl.cdiv(rows[i - 1], BN)
        linear = tl.where(of_all >= before_it, i, linear)
        tile = tl.where(of_all >= before_it, of_all - before_it, tile)
    weight, stride_weight = _of_linear(weights, linear, LINEARS), _of_linear(strides_weight, linear, LINEARS)
    table, N = _of_linear(tables, linear, LINEARS), _of_linear(rows, linear, LINEARS)
    if is_base:
        scale = _of_linear(scales, linear, LINEARS)
        half, part = base // base_parts % HALVES, base % base_parts
        end = half + 1
        home = work + (of_all * cells + part).to(tl.int64) * (M * BN)
        _base_item(
            *(x, weight, scale, order, home, stride_x, stride_weight, tile, half, part, base_parts, tokens, N, K),
            *(EVEN_K, INTERPRET, BN, BASE_BN, BASE_BK, M, BASE_STAGES, EARLY, CODES),
        )
    else:
        half, end = tile * 0, tile * 0 + HALVES  # all of the tile
        piece, part = delta // parts % wave, delta % parts
        home = work + (of_all * cells + base_parts + part).to(tl.int64) * (M * BN)
        if EARLY:
            tl.extra.cuda.gdc_wait()
        if AGAIN:
            for p in tl.range(bound(piece, INTERPRET), bound(pieces, INTERPRET), bound(wave, INTERPRET), num_stages=1):
                _delta_item(
                    *(x, arena, table, slots, starts, order, home, stride_x, tile, p, part, parts, N, K),
                    *(TWO, ONE, SALIENT, GROUP, EVEN_K, EVEN_N, INTERPRET, BN, MT, STAGES),
                )
        else:
            _delta_item(
                *(x, arena, table, slots, starts, order, home, stride_x, tile, piece, part, parts, N, K),
                *(TWO, ONE, SALIENT, GROUP, EVEN_K, EVEN_N, INTERPRET, BN, MT, STAGES),
            )
    owned = tl.load(starts + pieces)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tl.debug_barrier()
    first = work + (of_all * cells).to(tl.int64) * (M * BN)
    y, stride_y = _of_linear(ys, linear, LINEARS), _of_linear(strides_y, linear, LINEARS)
    bias, arrived = _of_linear(biases, linear, LINEARS), _of_linear(arrivals, linear, LINEARS)
    for h in tl.range(bound(half, INTERPRET), bound(end, INTERPRET), num_stages=1):
        counter = arrived + tile * HALVES + h
        if tl.atomic_add(counter, 1, sem="acq_rel") == base_parts + wave * parts - 1:
            tl.store(counter, 0)
            _finish(
                *(y, bias, order, first, stride_y, tile, h, owned, tokens, base_parts, parts, N),
                *(BIAS, BN, BASE_BN, M, PARTS, COLUMNS),
            )


def fused_constants(
    config: FusedConfig,
    rows: Sequence[int],
    in_features: int,
    variant: Variant,
    bias: bool,
    again: bool = False,
    codes: torch.dtype | None = None,
) -> dict[str, Any]:
    """What the fused kernel is compiled for.

    Args:
        rows: of each linear.
        variant: that the deltas of all of them fit.
        again: a program may take several pieces.
        codes: dtype of the base's `Codes`; None for weights in 16 bit.
    """
    uneven = next((count for count in rows if count % config.delta.rows), rows[0])
    return shared_constants(config.delta, uneven, in_features, variant) | {
        "LINEARS": len(rows),
        "BIAS": bias,
        "BASE_BN": config.base_rows,
        "BASE_BK": config.base_channels,
        "M": config.columns,
        "PARTS": config.base_split + config.delta.split,
        "COLUMNS": min(config.columns, 8 * config.delta.warps),
        "BASE_STAGES": config.base_stages,
        "AGAIN": again,
        "CODES": KINDS[codes],
        "maxnreg": 200 if variant.one else 168,  # adding up at the end must not cost the loops their neighbours
    }


def fused(
    ys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    layers: Sequence[SlotLinear],
    routing: Routing,
    config: FusedConfig | None = None,
    scales: Sequence[Tensor] | None = None,
) -> None:
    """`y = x W^T + x D^T` of each linear, in one launch; see `linear.fused_linears` for what they have in common.

    Args:
        scales: where the weights are codes, as of `Codes`.
    """
    rows, width = [layer.rows for layer in layers], layers[0].in_features
    variant = Variant.over(layer.variant for layer in layers)
    pieces, tokens = routing.slots.numel(), len(x)
    wave = min(routing.likely, pieces)
    codes = None if scales is None else weights[0].dtype
    columns = bucket(tokens, least=8)
    config = config or choose_fused(sum(rows), width, routing.likely, columns, variant.planes, codes)
    tiles = sum(math.ceil(count / config.delta.rows) for count in rows)
    parts = config.base_split, config.delta.split
    base_items = tiles * (config.delta.rows // config.base_rows) * config.base_split
    delta_items = tiles * wave * config.delta.split
    size = tiles * sum(parts) * config.delta.rows * config.columns
    work = torch.empty(size, dtype=torch.float32, device=x.device)
    before = round(config.before * delta_items)
    every = min(config.every, (base_items + delta_items - before) // base_items)
    has_bias = biases[0] is not None
    arena, _, *step = places(layers[0], routing)
    fused_kernel[(base_items + delta_items,)](
        *(x, tuple(ys), tuple(weights if codes is None else (w.view(torch.int8) for w in weights))),
        *(tuple(scales or weights), tuple(biases if has_bias else ys)),
        *(arena, tuple(layer.table for layer in layers), *step, work, tuple(layer.arrived for layer in layers)),
        *(x.stride(0), tuple(y.stride(0) for y in ys), tuple(w.stride(0) for w in weights), tuple(rows), width),
        *(tokens, pieces, wave, *parts, before, every),
        **fused_constants(config, rows, width, variant, has_bias, pieces > wave, codes),
    )

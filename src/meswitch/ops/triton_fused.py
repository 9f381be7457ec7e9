"""Decode on a GPU: a linear's base product and the deltas of all experts, in one launch.

The grid is a list of work items. Those of the base are a tile of rows times a part of the input channels for all
tokens, those of the deltas a tile of rows times a part of one expert's channels for its tokens. A base item reads much
and computes little, a delta item the reverse, and a multiprocessor holds some of both. Every item leaves its partial
sums in scratch memory; the one that is the last of a tile of rows adds them up in a fixed order and writes y.

Columns are not tokens but places in the routing's order, so that an expert's tokens are neighbours.
"""

import triton
import triton.language as tl

from meswitch.ops.triton_delta import bound, delta_tile


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
):
    """[BN, M] float32: rows n of the base, blocks of BK channels from start to end."""
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
        if INTERPRET:
            acc = tl.dot(w.to(tl.float32), x.to(tl.float32), acc)
        else:
            acc = tl.dot(w, x, acc)
    return acc


@triton.jit
def _base_item(
    x,
    weight,
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
):
    place = half * BASE_BN + tl.arange(0, BASE_BN)
    m = tl.arange(0, M)
    token = tl.load(order + tl.minimum(m, tokens - 1))
    x_rows = x + token.to(tl.int64) * stride_x
    blocks = tl.cdiv(K, BASE_BK)
    start, end = part * blocks // parts, (part + 1) * blocks // parts
    n = tile * BN + place
    acc = _base_tile(x_rows, weight, stride_weight, n, start, end, N, K, EVEN_K, INTERPRET, BASE_BN, BASE_BK, M, STAGES)
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
    e,
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
    slot = tl.load(slots + e)
    first, last = tl.load(starts + e), tl.load(starts + e + 1)
    if (slot >= 0) & (first < last):
        place = tl.arange(0, BN)
        m = tl.arange(0, MT)
        token = tl.load(order + tl.minimum(first + m, last - 1))
        x_rows = x + token.to(tl.int64) * stride_x
        row = table + slot.to(tl.int64) * 8
        n = tile * BN + place
        acc = delta_tile(
            x_rows,
            arena,
            row,
            n,
            part,
            parts,
            N,
            K,
            TWO,
            ONE,
            SALIENT,
            GROUP,
            EVEN_K,
            EVEN_N,
            INTERPRET,
            BN,
            MT,
            STAGES,
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
    owned,
    tokens,
    base_parts,
    parts,
    N,
    BIAS: tl.constexpr,
    BN: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up what a tile's items left; the places from `owned` on are the base's own tokens."""
    place = tl.arange(0, BN)
    n = tile * BN + place
    for chunk in tl.static_range(M // COLUMNS):
        m = chunk * COLUMNS + tl.arange(0, COLUMNS)
        cells = home + m[None, :] * BN + place[:, None]
        acc = tl.zeros([BN, COLUMNS], tl.float32)
        for part in tl.static_range(PARTS):
            columns = tl.where(part < base_parts, tokens, tl.where(part < base_parts + parts, owned, 0))
            acc += tl.load(cells + part * (M * BN), mask=(m < columns)[None, :], other=0.0, cache_modifier=".cg")
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        token = tl.load(order + tl.minimum(m, tokens - 1))
        out = y + token.to(tl.int64)[None, :] * stride_y + n[:, None]
        tl.store(out, acc.to(y.dtype.element_ty), mask=(m < tokens)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["tokens", "experts", "base_parts", "parts", "turn"])
def fused_kernel(
    x,
    y,
    weight,
    bias,
    arena,
    table,
    slots,
    starts,
    order,
    work,
    arrived,
    stride_x,
    stride_y,
    stride_weight,
    N,
    K,
    tokens,
    experts,
    base_parts,
    parts,
    turn,
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
):
    HALVES: tl.constexpr = BN // BASE_BN
    program = (tl.program_id(0) + turn) % tl.num_programs(0)  # which item starts first
    cells = base_parts + parts
    base_items = tl.cdiv(N, BN) * HALVES * base_parts
    if program < base_items:
        tile = program // (base_parts * HALVES)
        half, part = program // base_parts % HALVES, program % base_parts
        home = work + (tile * cells + part).to(tl.int64) * (M * BN)
        _base_item(
            *(x, weight, order, home, stride_x, stride_weight, tile, half, part, base_parts, tokens, N, K),
            *(EVEN_K, INTERPRET, BN, BASE_BN, BASE_BK, M, BASE_STAGES),
        )
    else:
        item = program - base_items
        tile = item // (parts * experts)
        e, part = item // parts % experts, item % parts
        home = work + (tile * cells + base_parts + part).to(tl.int64) * (M * BN)
        _delta_item(
            *(x, arena, table, slots, starts, order, home, stride_x, tile, e, part, parts, N, K),
            *(TWO, ONE, SALIENT, GROUP, EVEN_K, EVEN_N, INTERPRET, BN, MT, STAGES),
        )
    tl.debug_barrier()
    if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == HALVES * base_parts + experts * parts - 1:
        tl.store(arrived + tile, 0)
        first = work + (tile * cells).to(tl.int64) * (M * BN)
        owned = tl.load(starts + experts)
        _finish(y, bias, order, first, stride_y, tile, owned, tokens, base_parts, parts, N, BIAS, BN, M, PARTS, COLUMNS)

"""`W + D` for whole tiles of a layer, and single rows of it for embeddings, from the kernels' layout.

A tile is [rows, 256 channels]. A lane holds 8 neighbouring channels: they are one code d of 8 neighbouring words, so it
loads those words (other lanes of the warp load the same ones for their own d: one access to memory), shifts each by the
same amount, and stores 16 bytes; a warp writes whole rows of 512 bytes. That spends registers and instructions, of
which a kernel that must write 2 bytes a weight has plenty: 27 instructions a weight pass while DRAM takes 2.8 bytes. In
bf16 and at 2 bits, tiles without a salient channel take six instructions for two weights.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meswitch.ops.layout import Variant
from meswitch.ops.prefill import MERGED
from meswitch.ops.triton import INTERPRET
from meswitch.ops.triton.delta import bound, salient_index
from meswitch.ops.triton.items import MERGE_TILES, MergeTile
from meswitch.ops.triton.unpack import MERGE_BF16

BLOCK = tl.constexpr(256)  # channels of a tile; divides the blocks of both kinds of planes


@triton.jit
def _words(plane, n, k_block, channel, N, there, BITS: tl.constexpr):
    """The word that has each channel's code: [rows, 1, 1], [1, G, GS] -> [rows, G, GS] int32."""
    block = (k_block // (2 // BITS)).to(tl.int64)
    ptr = plane + (block * N + n) * 16 + channel % 16
    return tl.load(ptr, mask=there & (n < N), other=0)


@triton.jit
def _codes(words, k_block, channel, BITS: tl.constexpr):
    """Shift each channel's code down: [rows, G, GS] int32."""
    d = channel // 16
    if BITS == 1:
        d += k_block % 2 * 16
    return (words >> (d * BITS)) & (2**BITS - 1)


@triton.jit
def _fetch(
    arena,
    row,
    start,
    n,
    k_block,
    channel,
    N,
    K,
    TWO: tl.constexpr,
    SALIENT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """What a tile needs of any delta, to load ahead: words of the first plane, scales, its salient channels or -1."""
    twos, ones, salients = tl.load(row), tl.load(row + 1), tl.load(row + 7)
    if TWO:
        words = _words(arena + tl.load(row + 2) * 4, n, k_block, channel, N, twos > 0, 2)
    else:
        words = _words(arena + tl.load(row + 3) * 4, n, k_block, channel, N, ones > 0, 1)
    if GROUP == 0:
        group = tl.arange(0, 1)[None, :, None]
    elif GROUPS == 1:
        group = tl.arange(0, 1)[None, :, None] + k_block // (GROUP // BLOCK)
    else:
        group = tl.arange(0, GROUPS)[None, :, None] + k_block * GROUPS
    scale_ptr = (arena + tl.load(row + 4) * 4).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    there = (twos + ones > 0) & (n < N)
    if GROUP > 0:
        there = there & (group * GROUP < K)
    scale = tl.load(scale_ptr + group.to(tl.int64) * N + n, mask=there, other=0.0)  # 0 makes an absent delta 0
    s = tl.arange(0, SALIENT if SALIENT else 1)
    own = salient_index(arena, row, start, salients)
    columns = tl.load(own + s, mask=s < salients, other=-1)
    real = (columns // BLOCK == k_block) & ((s == 0) | (columns > 0))  # ascending: a later 0 is padding
    return words, scale, tl.where(real & (columns >= 0), columns, -1)


@triton.jit
def _delta(
    words,
    scale,
    columns,
    arena,
    row,
    start,
    n,
    k_block,
    channel,
    N,
    K,
    TWO: tl.constexpr,
    ONE: tl.constexpr,
    SALIENT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """[rows, G, GS] float32: a tile of D; zeros for an absent delta.

    words, scale, columns: from `_fetch`. start: the tile's first row. n: [rows, 1, 1]. channel: [1, G, GS] in the tile.
    """
    twos, ones, salients = tl.load(row), tl.load(row + 1), tl.load(row + 7)
    if TWO:
        code = _codes(words, k_block, channel, 2)
        if twos > 1:
            second = arena + (tl.load(row + 2) + tl.cdiv(K, BLOCK) * N * 4) * 4
            code += _codes(_words(second, n, k_block, channel, N, True, 2), k_block, channel, 2) << 2
        if ONE:
            third = _words(arena + tl.load(row + 3) * 4, n, k_block, channel, N, ones > 0, 1)
            code += _codes(third, k_block, channel, 1) << (2 * twos).to(tl.int32)
    else:
        code = _codes(words, k_block, channel, 1)
    top = (1 << (2 * twos + ones).to(tl.int32)) - 1
    value = (code * 2 - top).to(tl.float32) * scale.to(tl.float32)
    if SALIENT:
        if tl.max(columns, axis=0) >= 0:
            index_ptr = salient_index(arena, row, start, salients)
            salient_ptr = (arena + tl.load(row + 6) * 4).to(tl.pointer_type(tl.bfloat16), bitcast=True)
            low, high = _span(columns, SALIENT)
            for i in range(bound(low, INTERPRET), bound(high, INTERPRET)):
                column = tl.load(index_ptr + i) - k_block * BLOCK
                mine = tl.load(salient_ptr + n.to(tl.int64) * salients + i, mask=n < N, other=0.0)
                value += tl.where(channel == column, mine.to(tl.float32), 0.0)
    return value


@triton.jit
def _span(columns, SALIENT: tl.constexpr):
    """Which of the salient channels lie in this block of channels: some that follow one another."""
    s = tl.arange(0, SALIENT)
    low = tl.min(tl.where(columns >= 0, s, SALIENT), axis=0)
    return low, low + tl.sum((columns >= 0).to(tl.int32), axis=0)


@triton.jit
def _salient(
    merged,
    weight,
    stride_w,
    columns,
    arena,
    row,
    start,
    n,
    k_block,
    channel,
    N,
    SALIENT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A merged tile of 2 bits with its salient channels computed anew, so that their sums are rounded once as well."""
    salients = tl.load(row + 7)
    index_ptr = salient_index(arena, row, start, salients)
    salient_ptr = (arena + tl.load(row + 6) * 4).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    scale_ptr = (arena + tl.load(row + 4) * 4).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    low, high = _span(columns, SALIENT)
    for i in range(low, high):
        k = tl.load(index_ptr + i)
        column, inside = k - k_block * BLOCK, n < N
        word = _words(arena + tl.load(row + 2) * 4, n, k_block, column, N, True, 2)
        group = k // GROUP if GROUP > 0 else 0
        scale = tl.load(scale_ptr + group * N + n, mask=inside, other=0.0).to(tl.float32)
        level = (_codes(word, k_block, column, 2) * 2 - 3).to(tl.float32)
        mine = tl.load(salient_ptr + n.to(tl.int64) * salients + i, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + n.to(tl.int64) * stride_w + k, mask=inside, other=0.0).to(tl.float32)
        merged = tl.where(channel == column, (w + level * scale + mine).to(merged.dtype), merged)
    return merged


@triton.jit
def _merged(
    w,
    weight,
    stride_w,
    words,
    scale,
    columns,
    arena,
    row,
    start,
    n,
    k_block,
    channel,
    N,
    K,
    TWO: tl.constexpr,
    ONE: tl.constexpr,
    SALIENT: tl.constexpr,
    GROUP: tl.constexpr,
    FAST: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A tile of W plus one delta."""
    if FAST:
        if tl.load(row) > 1:  # a second plane
            delta = _delta(
                words, scale, columns, arena, row, start, n, k_block, channel, N, K, TWO, ONE, SALIENT, INTERPRET
            )
            merged = (w.to(tl.float32) + delta).to(w.dtype)
        else:
            turn = (channel // 16 * 2 + 31) & 31
            merged = tl.inline_asm_elementwise(
                MERGE_BF16, "=r,r,r,r,r,r,r", [words, turn, w, scale], dtype=tl.bfloat16, is_pure=True, pack=2
            )
            if SALIENT:
                if tl.max(columns, axis=0) >= 0:
                    merged = _salient(
                        *(merged, weight, stride_w, columns, arena, row, start, n, k_block, channel, N, SALIENT, GROUP)
                    )
    else:  # a branch on a constant within a loop would be compiled with both sides, and those differ in fp16
        delta = _delta(
            words, scale, columns, arena, row, start, n, k_block, channel, N, K, TWO, ONE, SALIENT, INTERPRET
        )
        merged = (w.to(tl.float32) + delta).to(w.dtype)
    return merged


@triton.jit
def merge_kernel(
    weight,
    out,
    arena,
    table,
    slots,
    first,
    last,
    stride_w,
    N,
    K,
    EXPERTS: tl.constexpr,
    TWO: tl.constexpr,
    ONE: tl.constexpr,
    SALIENT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Rows first to last of W plus each of EXPERTS deltas: out [EXPERTS, last - first, K]; W's tile is read once."""
    k_block = tl.program_id(0)
    start = first + tl.program_id(1) * ROWS
    local = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None, None]
    n = first + local
    SPAN: tl.constexpr = BLOCK // GROUPS
    channel = tl.arange(0, GROUPS)[None, :, None] * SPAN + tl.arange(0, SPAN)[None, None, :]
    k = k_block * BLOCK + channel
    if EVEN:
        w = tl.load(weight + n.to(tl.int64) * stride_w + k, eviction_policy="evict_first")
    else:
        inside = (n < last) & (k < K)
        w = tl.load(weight + n.to(tl.int64) * stride_w + k, mask=inside, other=0.0, eviction_policy="evict_first")
    row = table + tl.load(slots).to(tl.int64) * 8
    words, scale, columns = _fetch(arena, row, start, n, k_block, channel, N, K, TWO, SALIENT, GROUP, GROUPS)
    for e in tl.static_range(EXPERTS):
        if e + 1 < EXPERTS:
            following = table + tl.load(slots + e + 1).to(tl.int64) * 8
            next_words, next_scale, next_columns = _fetch(
                arena, following, start, n, k_block, channel, N, K, TWO, SALIENT, GROUP, GROUPS
            )
        merged = _merged(
            *(w, weight, stride_w, words, scale, columns, arena, row, start, n, k_block, channel, N, K),
            *(TWO, ONE, SALIENT, GROUP, FAST, INTERPRET),
        )
        ptr = out + (e * (last - first) + local).to(tl.int64) * K + k
        if EVEN:
            tl.store(ptr, merged)
        else:
            tl.store(ptr, merged, mask=inside)
        if e + 1 < EXPERTS:
            row, words, scale, columns = following, next_words, next_scale, next_columns


@triton.jit
def rows_kernel(
    ids,
    token_slots,
    weight,
    extra,
    out,
    arena,
    table,
    stride_w,
    extra_rows,
    N,
    K,
    TWO: tl.constexpr,
    ONE: tl.constexpr,
    SALIENT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    EXTRA: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One row of W plus its expert's row of D, or a row that only the expert has: out [tokens, K]."""
    k_block, token = tl.program_id(0), tl.program_id(1)
    slot, own = tl.load(token_slots + token), tl.load(ids + token)
    SPAN: tl.constexpr = BLOCK // GROUPS
    channel = tl.arange(0, GROUPS)[None, :, None] * SPAN + tl.arange(0, SPAN)[None, None, :]
    k = k_block * BLOCK + channel
    known = own < N
    w = tl.load(weight + own.to(tl.int64) * stride_w + k, mask=known & (k < K), other=0.0).to(tl.float32)
    if slot >= 0:
        if known:
            row = table + slot.to(tl.int64) * 8
            start = own.to(tl.int32)
            n = (start + tl.arange(0, 1))[:, None, None]
            words, scale, columns = _fetch(arena, row, start, n, k_block, channel, N, K, TWO, SALIENT, GROUP, GROUPS)
            w += _delta(
                words, scale, columns, arena, row, start, n, k_block, channel, N, K, TWO, ONE, SALIENT, INTERPRET
            )
        elif EXTRA:
            place = slot.to(tl.int64) * extra_rows + tl.minimum(own - N, extra_rows - 1)
            w = tl.load(extra + place * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * K + k, w.to(out.dtype.element_ty), mask=k < K)


def merge_rows(
    out: Tensor,
    weight: Tensor,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    first: int,
    last: int,
    variant: Variant,
    tile: MergeTile | None = None,
) -> None:
    """The Triton kernel, once for every `MERGED` experts; shapes as for `prefill.merge`."""
    (rows, width), block = weight.shape, BLOCK.value
    for e in range(0, len(slots), MERGED):
        experts = min(MERGED, len(slots) - e)
        used = tile or MERGE_TILES[experts]
        merge_kernel[(-(-width // block), -(-(last - first) // used.rows))](
            *(weight, out[e:], arena.view(torch.int32), table, slots[e:], first, last, weight.stride(0), rows, width),
            **merge_constants(experts, used, last - first, width, variant, weight.dtype),
            **row_constants(variant),
        )


def merge_constants(
    experts: int, tile: MergeTile, rows: int, in_features: int, variant: Variant, dtype: torch.dtype
) -> dict[str, Any]:
    """What `merge_kernel` is compiled for besides `row_constants`."""
    even = in_features % BLOCK.value == 0 and rows % tile.rows == 0
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    fast = dtype == torch.bfloat16 and variant.two > 0 and not variant.one and not INTERPRET
    return {"EXPERTS": experts, "EVEN": even, "FAST": fast, "ROWS": tile.rows, "num_warps": tile.warps, **limit}


def row_constants(variant: Variant) -> dict[str, Any]:
    """What both kernels are compiled for."""
    block, group = BLOCK.value, variant.group
    return {
        "TWO": variant.two > 0,
        "ONE": variant.one,
        "SALIENT": variant.salient,
        "GROUP": group,
        "GROUPS": block // group if 0 < group < block else 1,
        "INTERPRET": INTERPRET,
    }

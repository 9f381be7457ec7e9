"""`x (W + D)^T` for segments of several experts on sm_90, with `W + D` made in registers and nowhere else.

A tile is 128 rows of the weight by 256 tokens of one expert. `wgmma` takes its left operand from registers, so the
weight is on the left and what comes out is y's transpose. One partition of warps brings tiles of W and x to shared
memory by TMA, 64 input channels at a time; two others, 64 rows each, read their part of W in the operand's layout, add
level times scale to it, two weights an instruction, and multiply. They do not wait for each other: while one restores,
the other's products keep the matrix unit busy. Restoring 64 x 64 weights is some 60 instructions a thread, and their
product with 256 tokens takes the matrix unit 512 clocks.

Codes and scales go from memory straight to the registers that need them, a block of 256 channels ahead: words j, j + 1
of a row are neighbours in the operand's layout (see `layout.py`). Salient channels are one more step of each tile: the
first partition gathers their columns of x, 16 at a time.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from meswitch.ops import layout, prefill, routing
from meswitch.ops.layout import SlotLinear, Variant
from meswitch.ops.triton.unpack import RESTORE_BF16, RESTORE_REGISTERS

ROWS, TOKENS = gl.constexpr(prefill.TILE_ROWS), gl.constexpr(routing.TILE_TOKENS)
CHANNELS, BLOCK = gl.constexpr(prefill.CHANNELS), gl.constexpr(prefill.BLOCK)
STEPS = gl.constexpr(4)  # of a block; as many have room in shared memory, so each has a place of its own
SALIENT_ROWS = gl.constexpr(layout.SALIENT_ROWS)
_HALF = gl.constexpr(64)  # rows of a partition
_CHUNK = gl.constexpr(64)  # tokens that a partition writes at a time
_WRITTEN = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # so that a warp stores rows of 128 bytes
_TOGETHER = gl.constexpr(16)  # row tiles that are under way at once: what they read of W and x stays in L2


@gluon.jit
def _tile(number, segments, token_tiles, row_tiles):
    """First row, first token, the segment's first token, its end and its slot."""
    width = _TOGETHER * token_tiles
    first = number // width * _TOGETHER
    size = gl.minimum(row_tiles - first, _TOGETHER)
    segment = segments + number % width // size * 4
    row = (first + number % width % size) * ROWS
    return row, gl.load(segment), gl.load(segment + 1), gl.load(segment + 2), gl.load(segment + 3)


@gluon.jit
def _entry(table, slot):
    """Whether a slot has a delta; where its words, scales and salient weights lie in the arena; how many of these.

    The base, slot -1, has none.
    """
    entry = table + gl.maximum(slot, 0).to(gl.int64) * 8
    words, scales, salient = gl.load(entry + 2) * 4, gl.load(entry + 4) * 4, gl.load(entry + 6) * 4
    salients = gl.where(slot < 0, 0, gl.load(entry + 7).to(gl.int32))
    return (slot >= 0) & (gl.load(entry) > 0), words, scales, salient, salients


@gluon.jit
def _scales(scale_ptr, there, block, N, GROUP: gl.constexpr):
    """Of both halves of a block."""
    if GROUP == 0:
        group = block * 0
    elif GROUP >= BLOCK:
        group = block // (GROUP // BLOCK)
    else:
        group = block * 2
    first = gl.load(scale_ptr + group.to(gl.int64) * N, mask=there, other=0.0)
    if GROUP == BLOCK // 2:
        return first, gl.load(scale_ptr + (group + 1).to(gl.int64) * N, mask=there, other=0.0)
    else:
        return first, first


@gluon.jit
def _first_words(arena, words_at, scales_at, there, n, j, N, GROUP: gl.constexpr):
    """Pointers to the words and scales of rows n, the first block's words, its scales."""
    word_ptr = arena + words_at + (n * 16)[:, None] + j[None, :]
    scale_ptr = (arena + scales_at).to(gl.pointer_type(gl.bfloat16), bitcast=True) + n
    first, second = _scales(scale_ptr, there, words_at * 0, N, GROUP)
    return word_ptr, scale_ptr, gl.load(word_ptr, mask=there, other=0), first, second


@gluon.jit
def _restored(w_tile, words, scale, STEP: gl.constexpr, LEFT: gl.constexpr):
    """Four times 16 channels of W + D, [64, 16] each in the left operand's layout."""
    scales = scale[:, None] + gl.zeros([_HALF, 16], gl.bfloat16, layout=LEFT)
    return gl.inline_asm_elementwise(
        RESTORE_BF16[STEP],
        RESTORE_REGISTERS,
        [
            words,
            w_tile.slice(0, 16, dim=1).load(LEFT),
            w_tile.slice(16, 16, dim=1).load(LEFT),
            w_tile.slice(32, 16, dim=1).load(LEFT),
            w_tile.slice(48, 16, dim=1).load(LEFT),
            scales,
        ],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _bring(inputs, sizes, rooms, barriers, SALIENT: gl.constexpr):
    """The partition that fills shared memory."""
    x_desc, w_desc, x, arena, table, segments = inputs
    stride_x, token_tiles, N, K = sizes
    w_tiles, x_tiles, columns = rooms
    full, empty, columns_full, columns_empty = barriers
    gathered: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    row_tiles = N // ROWS
    phase, columns_phase = 0, 0
    for number in range(gl.program_id(0), row_tiles * token_tiles, gl.num_programs(0)):
        row, token, _, last, slot = _tile(number, segments, token_tiles, row_tiles)
        for block in range(K // BLOCK):
            for step in gl.static_range(STEPS):
                k = block * BLOCK + step * CHANNELS
                mbarrier.wait(empty.index(step), phase ^ 1)
                mbarrier.expect(full.index(step), (ROWS + TOKENS) * CHANNELS * 2)
                tma.async_copy_global_to_shared(w_desc, [row, k], full.index(step), w_tiles.index(step))
                tma.async_copy_global_to_shared(x_desc, [token, k], full.index(step), x_tiles.index(step))
            phase ^= 1
        if SALIENT:
            entry = table + gl.maximum(slot, 0).to(gl.int64) * 8
            salients = gl.where(slot < 0, 0, gl.load(entry + 7).to(gl.int32))
            index = arena + gl.load(entry + 5) * 4 + row // SALIENT_ROWS * salients
            s = gl.arange(0, 16, gl.SliceLayout(0, gathered))
            m = gl.arange(0, _CHUNK, gl.SliceLayout(1, gathered))
            for first in range(0, salients, 16):
                channel = gl.load(index + first + s)
                mbarrier.wait(columns_empty, columns_phase ^ 1)
                for chunk in gl.static_range(TOKENS // _CHUNK):
                    t = gl.minimum(token + chunk * _CHUNK + m, last - 1)
                    values = gl.load(x + t.to(gl.int64)[:, None] * stride_x + channel[None, :])
                    columns.slice(chunk * _CHUNK, _CHUNK, dim=0).store(values)
                fence_async_shared()
                mbarrier.arrive(columns_full)
                columns_phase ^= 1


@gluon.jit
def _multiply(
    y,
    bias,
    stride_y,
    written,
    inputs,
    sizes,
    rooms,
    barriers,
    HALF: gl.constexpr,
    GROUP: gl.constexpr,
    SALIENT: gl.constexpr,
    BIAS: gl.constexpr,
):
    """A partition that restores 64 rows of each tile, the first or the second, and multiplies them."""
    _, _, _, arena, table, segments = inputs
    _, token_tiles, N, K = sizes
    w_tiles, x_tiles, columns = rooms
    full, empty, columns_full, columns_empty = barriers
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    row_tiles, blocks = N // ROWS, K // BLOCK
    tiles, programs = row_tiles * token_tiles, gl.num_programs(0)
    phase, columns_phase = 0, 0
    j = gl.arange(0, 16, gl.SliceLayout(0, LEFT))
    own = HALF * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, LEFT))
    here = gl.minimum(gl.program_id(0), tiles - 1)  # a step of few segments has fewer tiles than there are programs
    row, token, begin, end, slot = _tile(here, segments, token_tiles, row_tiles)
    there, words_at, scales_at, salient_at, salients = _entry(table, slot)
    word_ptr, scale_ptr, words, scale, scale_2 = _first_words(arena, words_at, scales_at, there, row + own, j, N, GROUP)
    for number in range(gl.program_id(0), tiles, programs):
        following = gl.minimum(number + programs, tiles - 1)
        next_row, next_token, next_begin, next_end, slot = _tile(following, segments, token_tiles, row_tiles)
        next_there, words_at, scales_at, next_salient_at, next_salients = _entry(table, slot)
        if SALIENT:
            salient_ptr = (arena + salient_at).to(gl.pointer_type(gl.bfloat16), bitcast=True)
            salient_ptr += ((row + own) * salients)[:, None] + j[None, :]
            weights = gl.load(salient_ptr, mask=salients > 0, other=0.0)
        acc = gl.zeros([_HALF, TOKENS], gl.float32, layout=SUMS)
        for block in range(blocks):
            ahead = gl.minimum(block + 1, blocks - 1)
            next_words = gl.load(word_ptr + ahead.to(gl.int64) * N * 16, mask=there, other=0)
            next_scale, next_scale_2 = _scales(scale_ptr, there, ahead, N, GROUP)
            for step in gl.static_range(STEPS):
                mbarrier.wait(full.index(step), phase)
                w_tile = w_tiles.index(step).slice(HALF * _HALF, _HALF, dim=0)
                parts = _restored(w_tile, words, scale if step < STEPS // 2 else scale_2, step, LEFT)
                right = x_tiles.index(step)
                for d in gl.static_range(4):
                    columns_16 = right.slice(d * 16, 16, dim=1).permute((1, 0))
                    acc = warpgroup_mma(parts[d], columns_16, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(step))
            words, scale, scale_2 = next_words, next_scale, next_scale_2
            phase ^= 1
        if SALIENT:
            for first in range(0, salients, 16):
                mbarrier.wait(columns_full, columns_phase)
                acc = warpgroup_mma(weights, columns.permute((1, 0)), acc, is_async=True)
                weights = gl.load(salient_ptr + first + 16, mask=first + 16 < salients, other=0.0)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(columns_empty)
                columns_phase ^= 1
        # the next tile's first words are on their way while this one is written
        word_ptr, scale_ptr, words, scale, scale_2 = _first_words(
            arena, words_at, scales_at, next_there, next_row + own, j, N, GROUP
        )
        if BIAS:
            added = gl.load(bias + row + HALF * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, SUMS)))
            acc += added.to(gl.float32)[:, None]
        _write(acc.to(gl.bfloat16), y + row + HALF * _HALF, stride_y, token, begin, end, written)
        row, token, begin, end, there = next_row, next_token, next_begin, next_end, next_there
        salient_at, salients = next_salient_at, next_salients


@gluon.jit
def _write(sums, y, stride_y, token, begin, end, room):
    """[64, 256] sums as rows of y, those of the segment's tokens."""
    m, n = gl.arange(0, _CHUNK, gl.SliceLayout(1, _WRITTEN)), gl.arange(0, _HALF, gl.SliceLayout(0, _WRITTEN))
    first, second = sums.reshape([_HALF, 2, TOKENS // 2]).permute((0, 2, 1)).split()
    for side in gl.static_range(2):
        both = first if side == 0 else second
        low, high = both.reshape([_HALF, 2, _CHUNK]).permute((0, 2, 1)).split()
        for quarter in gl.static_range(2):
            room.permute((1, 0)).store(low if quarter == 0 else high)
            values = room.load(_WRITTEN)
            t = token + (side * 2 + quarter) * _CHUNK + m
            place = y + t.to(gl.int64)[:, None] * stride_y + n[None, :]
            gl.store(place, values, mask=((t >= begin) & (t < end))[:, None])


@gluon.jit
def product_kernel(
    x_desc,
    w_desc,
    x,
    arena,
    table,
    segments,
    y,
    bias,
    stride_x,
    stride_y,
    N,
    K,
    GROUP: gl.constexpr,
    SALIENT: gl.constexpr,
    BIAS: gl.constexpr,
):
    """Rows of y that are some segment's tokens. segments: [1 + tiles, 4] int32, see `routing.tile_table`."""
    token_tiles = gl.load(segments)  # read here, not given: a graph that holds the launch serves steps of any number
    segments += 4
    NARROW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    WIDE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    w_tiles = gl.allocate_shared_memory(gl.bfloat16, [STEPS, ROWS, CHANNELS], w_desc.layout)
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STEPS, TOKENS, CHANNELS], x_desc.layout)
    columns = gl.allocate_shared_memory(gl.bfloat16, [TOKENS, 16], NARROW)
    staged = gl.allocate_shared_memory(gl.bfloat16, [2, _CHUNK, _HALF], WIDE)
    full = gl.allocate_shared_memory(gl.int64, [STEPS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STEPS, 1], mbarrier.MBarrierLayout())
    columns_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    columns_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for step in gl.static_range(STEPS):
        mbarrier.init(full.index(step), count=1)
        mbarrier.init(empty.index(step), count=2)
    mbarrier.init(columns_full, count=1)
    mbarrier.init(columns_empty, count=2)
    inputs, sizes = (x_desc, w_desc, x, arena, table, segments), (stride_x, token_tiles, N, K)
    rooms, barriers = (w_tiles, x_tiles, columns), (full, empty, columns_full, columns_empty)
    gl.warp_specialize(
        [
            (_multiply, (y, bias, stride_y, staged.index(0), inputs, sizes, rooms, barriers, 0, GROUP, SALIENT, BIAS)),
            (_multiply, (y, bias, stride_y, staged.index(1), inputs, sizes, rooms, barriers, 1, GROUP, SALIENT, BIAS)),
            (_bring, (inputs, sizes, rooms, barriers, SALIENT)),
        ],
        [4, 4],
        [232, 40],
    )


def product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, layer: SlotLinear, tiles: Tensor) -> None:
    """Write the tokens of the tiles' segments, and no others.

    Args:
        y: [tokens, rows] bf16, rows are contiguous.
        x: [tokens, in_features].
        weight: [rows, in_features].
        bias: [rows].
        layer: the deltas of all slots.
        tiles: [1 + room, 4] int32, as `tile_table` has them, with one tile at least.
    """
    rows, width = weight.shape
    x = _reachable(x)
    product_kernel[(min(_processors(x.device), rows // ROWS.value * (len(tiles) - 1)),)](
        *descriptors(x, weight),
        *(x, layer.arena.view(torch.int32), layer.table, tiles, y, y if bias is None else bias),
        *(x.stride(0), y.stride(0), rows, width),
        **product_constants(layer.variant, bias is not None),
    )


def _reachable(x: Tensor) -> Tensor:
    """As the copy engine wants it: rows that begin at multiples of 16 bytes."""
    fits = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def descriptors(x: Tensor, weight: Tensor) -> tuple[Any, Any]:
    """What the copy engine takes for a matrix and a tile of it."""
    swizzled = gl.NVMMASharedLayout(swizzle_byte_width=2 * CHANNELS.value, element_bitwidth=16, rank=2)
    x_tiles = TensorDescriptor.from_tensor(x, [TOKENS.value, CHANNELS.value], swizzled)
    return x_tiles, TensorDescriptor.from_tensor(weight, [ROWS.value, CHANNELS.value], swizzled)


def product_constants(variant: Variant, bias: bool) -> dict[str, Any]:
    """What the kernel is compiled for. maxnreg: of 12 warps; those that multiply take more, those that bring fewer."""
    return {"GROUP": variant.group, "SALIENT": variant.salient > 0, "BIAS": bias, "num_warps": 4, "maxnreg": 168}


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

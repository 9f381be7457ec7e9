"""One expert's delta of a tile of rows, times the tokens of that expert: what the GPU kernels share."""

import triton
import triton.language as tl

from meswitch.ops import layout
from meswitch.ops.triton.unpack import ONE_BF16, ONE_FP16, ONE_REGISTERS, TWO_BF16, TWO_FP16, TWO_REGISTERS

SALIENT_ROWS = tl.constexpr(layout.SALIENT_ROWS)


@triton.jit
def _unpack(words, BITS: tl.constexpr, BF16: tl.constexpr):
    """[rows, 16] int32 -> 32 / BITS tensors [rows, 16] of levels.

    pack=2 hands two words of a row to the assembly, and the matrix unit's operand layout keeps words j and j + 1 of a
    row in neighbouring registers of a thread, so the results are operand registers as they are.
    """
    if BITS == 2:
        asm: tl.constexpr = TWO_BF16 if BF16 else TWO_FP16
        registers: tl.constexpr = TWO_REGISTERS
    else:
        asm: tl.constexpr = ONE_BF16 if BF16 else ONE_FP16
        registers: tl.constexpr = ONE_REGISTERS
    dtype: tl.constexpr = (tl.bfloat16 if BF16 else tl.float16,) * (32 // BITS)
    return tl.inline_asm_elementwise(asm, registers, [words], dtype=dtype, is_pure=True, pack=2)


@triton.jit
def _joined(levels, FIRST: tl.constexpr, COUNT: tl.constexpr, BN: tl.constexpr):
    """The levels of COUNT codes, [BN, 16] each, as [BN, 16 COUNT]: registers stay where they are."""
    if COUNT == 1:
        return levels[FIRST]
    elif COUNT == 2:
        return tl.reshape(tl.permute(tl.join(levels[FIRST], levels[FIRST + 1]), 0, 2, 1), [BN, 32])
    else:
        tl.static_assert(COUNT == 4)
        low, high = tl.join(levels[FIRST], levels[FIRST + 1]), tl.join(levels[FIRST + 2], levels[FIRST + 3])
        return tl.reshape(tl.permute(tl.join(low, high), 0, 3, 2, 1), [BN, 64])


@triton.jit
def bound(value, INTERPRET: tl.constexpr):
    """A loop's bound; the interpreter holds a [1] array there, which numpy 2.4 does not take for an integer."""
    if INTERPRET:
        return value.handle.data.item()
    else:
        return value


@triton.jit
def _plane(
    acc,
    x_rows,
    word_ptr,
    scale_ptr,
    start,
    end,
    n,
    N,
    K,
    factor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    INTERPRET: tl.constexpr,
    BN: tl.constexpr,
    MT: tl.constexpr,
    STAGES: tl.constexpr,
    JOIN: tl.constexpr,
):
    CODES: tl.constexpr = 32 // BITS
    BLOCK: tl.constexpr = 16 * CODES
    GROUPS: tl.constexpr = BLOCK // GROUP if GROUP > 0 and GROUP < BLOCK else 1
    COUNT: tl.constexpr = JOIN if JOIN < CODES // GROUPS else CODES // GROUPS  # codes of one dot
    DOTS: tl.constexpr = CODES // GROUPS // COUNT
    j = tl.arange(0, 16)
    inner = tl.arange(0, 16 * COUNT)
    for block in tl.range(bound(start, INTERPRET), bound(end, INTERPRET), num_stages=STAGES):
        ptr = word_ptr + (block * N + n).to(tl.int64)[:, None] * 16 + j[None, :]
        if EVEN_N:
            words = tl.load(ptr)
        else:
            words = tl.load(ptr, mask=(n < N)[:, None], other=0)
        if not INTERPRET:
            levels = _unpack(words, BITS, x_rows.dtype.element_ty == tl.bfloat16)
        for g in tl.static_range(GROUPS):
            part = tl.zeros([BN, MT], tl.float32)
            for d in tl.static_range(DOTS):
                k = block * BLOCK + (g * DOTS + d) * COUNT * 16 + inner
                if EVEN_K:
                    x = tl.load(x_rows[None, :] + k[:, None])
                else:
                    x = tl.load(x_rows[None, :] + k[:, None], mask=(k < K)[:, None], other=0.0)
                if INTERPRET:
                    if COUNT == 1:
                        codes = words >> ((g * DOTS + d) * BITS)
                    else:
                        shift = ((g * DOTS + d) * COUNT + tl.arange(0, COUNT)) * BITS
                        codes = tl.reshape(words[:, None, :] >> shift[None, :, None], [BN, 16 * COUNT])
                    level = ((codes & (2**BITS - 1)) * 2 - (2**BITS - 1)).to(tl.float32)
                    x = x.to(tl.float32)  # the interpreter multiplies the bits of bfloat16
                else:
                    level = _joined(levels, (g * DOTS + d) * COUNT, COUNT, BN)
                part = tl.dot(level, x, part)
            if GROUP == 0:
                group = 0
            elif GROUP < BLOCK:
                group = block * GROUPS + g
                if not EVEN_K:
                    group = tl.minimum(group, tl.cdiv(K, GROUP) - 1)
            else:
                group = block // (GROUP // BLOCK)
            if EVEN_N:
                scale = tl.load(scale_ptr + group * N + n)
            else:
                scale = tl.load(scale_ptr + group * N + n, mask=n < N, other=0.0)
            acc += part * (scale.to(tl.float32) * factor)[:, None]
    return acc


@triton.jit
def salient_index(arena, row, first, salients):
    """Where the salient channels of a tile are listed; first: its first row."""
    return arena + tl.load(row + 5) * 4 + first // SALIENT_ROWS * salients


@triton.jit
def delta_tile(
    x_rows,
    arena,
    row,
    tile,
    split,
    splits,
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
    JOIN: tl.constexpr = 1,
):
    """[BN, MT] float32: a tile of the delta at a table's row, input channels of one of `splits` parts.

    JOIN: codes that are one dot. Four load 64 channels of x at once, 16 bytes a thread, where one takes 16 loads of 4
    bytes; they need 205 registers instead of 168.
    """
    n = tile * BN + tl.arange(0, BN)
    twos, ones, salients = tl.load(row), tl.load(row + 1), tl.load(row + 7)
    scale_ptr = (arena + tl.load(row + 4) * 4).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    acc = tl.zeros([BN, MT], tl.float32)
    big = tl.cdiv(K, 512)
    per = tl.cdiv(big, splits)
    if TWO:
        blocks = tl.cdiv(K, 256)
        start, end = split * per * 2, tl.minimum((split + 1) * per * 2, blocks)
        factor = 1.0
        for p in range(bound(twos, INTERPRET)):
            words = arena + (tl.load(row + 2) + p * blocks * N * 4) * 4
            acc = _plane(
                acc,
                x_rows,
                words,
                scale_ptr,
                start,
                end,
                n,
                N,
                K,
                factor,
                2,
                GROUP,
                EVEN_K,
                EVEN_N,
                INTERPRET,
                BN,
                MT,
                STAGES,
                JOIN,
            )
            factor *= 4.0
    if ONE:
        if ones > 0:
            start, end = split * per, tl.minimum((split + 1) * per, big)
            words = arena + tl.load(row + 3) * 4
            acc = _plane(
                acc,
                x_rows,
                words,
                scale_ptr,
                start,
                end,
                n,
                N,
                K,
                tl.where(twos > 0, 4.0, 1.0),
                1,
                GROUP,
                EVEN_K,
                EVEN_N,
                INTERPRET,
                BN,
                MT,
                STAGES,
                JOIN,
            )
    if SALIENT:
        if (split == 0) & (salients > 0):
            index_ptr = salient_index(arena, row, tile * BN, salients)
            salient_ptr = (arena + tl.load(row + 6) * 4).to(tl.pointer_type(tl.bfloat16), bitcast=True)
            s = tl.arange(0, 16)
            # 16 at a time: a tile of more would not fit the registers
            for first in tl.range(0, bound(salients, INTERPRET), 16, num_stages=1):
                columns = tl.load(index_ptr + first + s, mask=first + s < salients, other=0)
                xs = tl.load(x_rows[None, :] + columns[:, None])
                mine = (n < N)[:, None] & (first + s < salients)[None, :]
                place = n.to(tl.int64)[:, None] * salients + first + s[None, :]
                ws = tl.load(salient_ptr + place, mask=mine, other=0.0)
                if INTERPRET:
                    acc = tl.dot(ws.to(tl.float32), xs.to(tl.float32), acc)
                else:
                    acc = tl.dot(ws.to(xs.dtype), xs, acc)
    return acc

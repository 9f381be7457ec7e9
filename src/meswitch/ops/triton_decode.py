"""Decode on a GPU: the deltas of all experts of a step in one launch."""

import triton
import triton.language as tl

from meswitch.ops.triton_unpack import ONE_BF16, ONE_FP16, ONE_REGISTERS, TWO_BF16, TWO_FP16, TWO_REGISTERS


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
def _bound(value, INTERPRET: tl.constexpr):
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
):
    CODES: tl.constexpr = 32 // BITS
    BLOCK: tl.constexpr = 16 * CODES
    GROUPS: tl.constexpr = BLOCK // GROUP if GROUP > 0 and GROUP < BLOCK else 1
    DOTS: tl.constexpr = CODES // GROUPS
    j = tl.arange(0, 16)
    for block in tl.range(_bound(start, INTERPRET), _bound(end, INTERPRET), num_stages=STAGES):
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
                k = block * BLOCK + (g * DOTS + d) * 16 + j
                if EVEN_K:
                    x = tl.load(x_rows[None, :] + k[:, None])
                else:
                    x = tl.load(x_rows[None, :] + k[:, None], mask=(k < K)[:, None], other=0.0)
                if INTERPRET:
                    level = (((words >> ((g * DOTS + d) * BITS)) & (2**BITS - 1)) * 2 - (2**BITS - 1)).to(tl.float32)
                    x = x.to(tl.float32)  # the interpreter multiplies the bits of bfloat16
                else:
                    level = levels[g * DOTS + d]
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
    TWO: tl.constexpr,
    ONE: tl.constexpr,
    SALIENT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    INTERPRET: tl.constexpr,
    PDL: tl.constexpr,
    BN: tl.constexpr,
    MT: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile, split, e = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + e)
    if slot < 0:
        return
    row = table + slot.to(tl.int64) * 8
    twos, ones, salients = tl.load(row), tl.load(row + 1), tl.load(row + 7)
    if twos + ones + salients == 0:
        return
    first, last = tl.load(starts + e), tl.load(starts + e + 1)
    if first == last:
        return
    m = tl.arange(0, MT)
    token = tl.load(order + tl.minimum(first + m, last - 1))
    x_rows = x + token.to(tl.int64) * stride_x
    n = tile * BN + tl.arange(0, BN)
    scale_ptr = (arena + tl.load(row + 4) * 4).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    acc = tl.zeros([BN, MT], tl.float32)
    big = tl.cdiv(K, 512)
    per = tl.cdiv(big, SPLIT)
    if TWO:
        blocks = tl.cdiv(K, 256)
        start, end = split * per * 2, tl.minimum((split + 1) * per * 2, blocks)
        factor = 1.0
        for p in range(_bound(twos, INTERPRET)):
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
            )
    if SALIENT:
        if (split == 0) & (salients > 0):
            index_ptr = arena + tl.load(row + 5) * 4
            salient_ptr = (arena + tl.load(row + 6) * 4).to(tl.pointer_type(tl.bfloat16), bitcast=True)
            s = tl.arange(0, SALIENT)
            columns = tl.load(index_ptr + s, mask=s < salients, other=0)  # experts differ in their count
            xs = tl.load(x_rows[None, :] + columns[:, None])
            mine = (n < N)[:, None] & (s < salients)[None, :]
            ws = tl.load(salient_ptr + n.to(tl.int64)[:, None] * salients + s[None, :], mask=mine, other=0.0)
            if INTERPRET:
                acc = tl.dot(ws.to(tl.float32), xs.to(tl.float32), acc)
            else:
                acc = tl.dot(ws.to(xs.dtype), xs, acc)
    if PDL:
        tl.extra.cuda.gdc_wait()  # the base's product is in y, and an earlier launch is done with the scratch memory
    if SPLIT > 1:
        cell = tile + e * tl.num_programs(0)
        offsets = tl.arange(0, MT)[None, :] * BN + tl.arange(0, BN)[:, None]
        home = work + cell.to(tl.int64) * (SPLIT * BN * MT)
        tl.store(home + split * (BN * MT) + offsets, acc)
        tl.debug_barrier()
        if tl.atomic_add(arrived + cell, 1, sem="acq_rel") < SPLIT - 1:
            return
        acc = tl.zeros([BN, MT], tl.float32)
        for other in tl.static_range(SPLIT):
            acc += tl.load(home + other * (BN * MT) + offsets, cache_modifier=".cg")
        tl.store(arrived + cell, 0)
    out = y + token.to(tl.int64)[None, :] * stride_y + n[:, None]
    mask = ((m < last - first)[None, :]) & (n < N)[:, None]
    before = tl.load(out, mask=mask, other=0.0)
    tl.store(out, (before.to(tl.float32) + acc).to(before.dtype), mask=mask)

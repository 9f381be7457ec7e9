"""Decode on a GPU: the deltas of all experts of a step in one launch."""

import triton
import triton.language as tl

from meswitch.ops.triton_delta import delta_tile


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
    BN: tl.constexpr,
    MT: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_wait()  # in every program: one that ended before would let the kernel after this one start
    tile, split, e = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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
        *(x_rows, arena, row, tile, split, SPLIT, N, K),
        *(TWO, ONE, SALIENT, GROUP, EVEN_K, EVEN_N, INTERPRET, BN, MT, STAGES),
    )
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
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
    n = tile * BN + tl.arange(0, BN)
    out = y + token.to(tl.int64)[None, :] * stride_y + n[:, None]
    mask = ((m < last - first)[None, :]) & (n < N)[:, None]
    before = tl.load(out, mask=mask, other=0.0)
    tl.store(out, (before.to(tl.float32) + acc).to(before.dtype), mask=mask)

"""A base's codes: as the numbers that they are, in registers, and a whole matrix of them as weights."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meswitch.ops import codes as layout
from meswitch.ops.codes import Codes
from meswitch.ops.triton import INTERPRET
from meswitch.ops.triton.unpack import (
    FP8_BF16,
    FP8_FP16,
    HIGH_BF16,
    HIGH_FP16,
    INT8_BF16,
    INT8_FP16,
    LOW_BF16,
    LOW_FP16,
)

NO_CODES, INT8, FP8, PAIRS = (tl.constexpr(kind) for kind in range(4))  # what a kernel is given
KINDS = {None: NO_CODES.value, torch.int8: INT8.value, torch.float8_e4m3fn: FP8.value, torch.uint8: PAIRS.value}
GROUP = tl.constexpr(layout.GROUP)
HALF = tl.constexpr(layout.GROUP // 2)  # bytes of a group of pairs
_ROWS, _BYTES = 4, 1024  # of a tile


@triton.jit
def numbers(codes, FLOAT: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr):
    """int8 -> bf16 or fp16 of the same shape, exact. FLOAT: the bits are those of FP8 e4m3."""
    if INTERPRET:
        if FLOAT:
            codes = codes.to(tl.float8e4nv, bitcast=True)
        return codes.to(tl.float32).to(tl.bfloat16 if BF16 else tl.float16)
    elif BF16:
        asm: tl.constexpr = FP8_BF16 if FLOAT else INT8_BF16
        return tl.inline_asm_elementwise(asm, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        asm: tl.constexpr = FP8_FP16 if FLOAT else INT8_FP16
        return tl.inline_asm_elementwise(asm, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def nibbles(pairs, HIGH: tl.constexpr, BF16: tl.constexpr, INTERPRET: tl.constexpr):
    """int8 -> bf16 or fp16 of the same shape: the low or the high four bits, less 8."""
    if INTERPRET:
        own = ((pairs.to(tl.int32) >> (4 if HIGH else 0)) & 15) - 8
        return own.to(tl.float32).to(tl.bfloat16 if BF16 else tl.float16)
    elif BF16:
        asm: tl.constexpr = HIGH_BF16 if HIGH else LOW_BF16
        return tl.inline_asm_elementwise(asm, "=&r,=&r,r", [pairs], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        asm: tl.constexpr = HIGH_FP16 if HIGH else LOW_FP16
        return tl.inline_asm_elementwise(asm, "=&r,=&r,r", [pairs], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def dequantise_kernel(
    codes,
    scale,
    out,
    N,
    K,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """out [N, K] = codes times their scales, rounded once."""
    BF16: tl.constexpr = out.dtype.element_ty == tl.bfloat16
    width = K // 2 if KIND == PAIRS else K  # bytes of a row
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    b = (tl.program_id(1) * BYTES + tl.arange(0, BYTES))[None, :]
    inside = (n < N) & (b < width)
    place = codes + n.to(tl.int64) * width + b
    if EVEN:
        read = tl.load(place)
    else:
        read = tl.load(place, mask=inside, other=0)
    if KIND == PAIRS:
        group = b // HALF
        own = tl.load(scale + group.to(tl.int64) * N + n, mask=inside, other=0.0)
        first = out + n.to(tl.int64) * K + group * GROUP + b % HALF
        low = nibbles(read, False, BF16, INTERPRET).to(tl.float32) * own
        high = nibbles(read, True, BF16, INTERPRET).to(tl.float32) * own
        tl.store(first, low.to(out.dtype.element_ty), mask=inside)
        tl.store(first + HALF, high.to(out.dtype.element_ty), mask=inside)
    else:
        own = tl.load(scale + n, mask=n < N, other=0.0)
        weights = numbers(read, KIND == FP8, BF16, INTERPRET).to(tl.float32) * own
        if EVEN:
            tl.store(out + n.to(tl.int64) * K + b, weights.to(out.dtype.element_ty))
        else:
            tl.store(out + n.to(tl.int64) * K + b, weights.to(out.dtype.element_ty), mask=inside)


def dequantise(codes: Codes, out: Tensor) -> None:
    """Write a matrix's weights; see `Codes.into`."""
    (rows, width), held = codes.shape, codes.codes
    dequantise_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(held.shape[1], _BYTES))](
        *(held.view(torch.int8), codes.scale, out, rows, width),
        **dequantise_constants(rows, width, held.dtype),
    )


def dequantise_constants(rows: int, in_features: int, codes: torch.dtype) -> dict[str, Any]:
    """What `dequantise_kernel` is compiled for."""
    width = in_features // 2 if codes == torch.uint8 else in_features
    even = rows % _ROWS == 0 and width % _BYTES == 0
    return {"KIND": KINDS[codes], "EVEN": even, "INTERPRET": INTERPRET, "ROWS": _ROWS, "BYTES": _BYTES}

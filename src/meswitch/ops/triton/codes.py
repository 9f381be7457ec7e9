"""A base's codes of 8 bits: as the numbers that they are, in registers, and a whole matrix of them as weights."""

import triton
import triton.language as tl
from torch import Tensor

from meswitch.ops.codes import Codes
from meswitch.ops.triton import INTERPRET
from meswitch.ops.triton.unpack import FP8_BF16, FP8_FP16, INT8_BF16, INT8_FP16

_ROWS, _CHANNELS = 4, 1024  # of a tile


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
def dequantise_kernel(
    codes,
    scale,
    out,
    N,
    K,
    FLOAT: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out [N, K] = codes times their row's scale, rounded once."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    place = n.to(tl.int64)[:, None] * K + k[None, :]
    inside = (n < N)[:, None] & (k < K)[None, :]
    if EVEN:
        read = tl.load(codes + place)
    else:
        read = tl.load(codes + place, mask=inside, other=0)
    exact = numbers(read, FLOAT, out.dtype.element_ty == tl.bfloat16, INTERPRET).to(tl.float32)
    weights = exact * tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    if EVEN:
        tl.store(out + place, weights.to(out.dtype.element_ty))
    else:
        tl.store(out + place, weights.to(out.dtype.element_ty), mask=inside)


def dequantise(codes: Codes, out: Tensor) -> None:
    """Write a matrix's weights; see `Codes.into`."""
    rows, width = codes.shape
    dequantise_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _CHANNELS))](
        *(codes.bytes, codes.scale, out, rows, width),
        **dequantise_constants(rows, width, codes.is_float),
    )


def dequantise_constants(rows: int, in_features: int, is_float: bool) -> dict[str, int | bool]:
    """What `dequantise_kernel` is compiled for."""
    even = rows % _ROWS == 0 and in_features % _CHANNELS == 0
    return {"FLOAT": is_float, "EVEN": even, "INTERPRET": INTERPRET, "ROWS": _ROWS, "CHANNELS": _CHANNELS}

"""The inner loop of error feedback as one kernel: columns in sequence, output features in parallel.

In PyTorch a column takes eight kernels of a few microseconds each, which for 14336 columns is seconds of launching.
Here one launch rounds `COLUMNS` of them. Each program holds the columns of `_OUTPUTS` output features in registers,
where a column that is done makes room for what there is to say about it: its errors and its codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 32
_OUTPUTS = 64  # of one warp; twice as many do not fit its registers
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_ROUND = tl.constexpr(1.5 * 2**23)  # adding and subtracting it rounds to the nearest integer, half to even


@triton.jit
def _round_columns(  # type: ignore[no-untyped-def]
    target, original, step, share, codes, errors, outputs, columns, TOP: tl.constexpr, C: tl.constexpr, T: tl.constexpr
):
    place = tl.arange(0, C)
    output = tl.program_id(0) * T + tl.arange(0, T)
    at = place[:, None] * outputs + output[None, :]
    inside = (place[:, None] < columns) & (output[None, :] < outputs)
    left = tl.load(target + at, mask=inside, other=0.0)  # becomes the errors
    unit = tl.load(step + at, mask=inside, other=0.0)  # becomes the codes
    for column in range(C):
        current = (place == column)[:, None]
        value = tl.sum(tl.where(current, left, 0.0), axis=0)
        size = tl.sum(tl.where(current, unit, 0.0), axis=0)
        half = tl.where(size > _TINY, tl.div_rn(0.5, tl.maximum(size, _TINY)), 0.0)
        code = value * half + TOP / 2
        code = tl.minimum(tl.maximum(code + _ROUND - _ROUND, 0.0), TOP)
        own = tl.load(original + column * outputs + output, mask=(column < columns) & (output < outputs), other=0.0)
        error = own + TOP * size - 2 * code * size
        later = (place > column) & (place < columns)
        taken = tl.load(share + column * columns + place, mask=later, other=0.0)
        left = tl.where(current, error[None, :], left + taken[:, None] * error[None, :])
        unit = tl.where(current, code[None, :], unit)
    tl.store(errors + at, left, mask=inside)
    tl.store(codes + at, unit.to(tl.uint8), mask=inside)


def round_columns(target: Tensor, original: Tensor, step: Tensor, share: Tensor, top: int, codes: Tensor) -> Tensor:
    """Round at most `COLUMNS` columns, each after the errors of those before it: `feedback.round_columns_on_host`.

    Args:
        target: [columns, out_features] float32, contiguous.
        original: alike.
        step: alike.
        share: [columns, columns] float32, upper triangular, of unit diagonal.
        codes: [columns, out_features] uint8, contiguous; filled.

    Returns:
        [columns, out_features] float32, the errors.
    """
    columns, outputs = target.shape
    errors = torch.empty_like(target)
    grid = (triton.cdiv(outputs, _OUTPUTS),)
    _round_columns[grid](
        target, original, step, share.contiguous(), codes, errors, outputs, columns, top, COLUMNS, _OUTPUTS, num_warps=1
    )
    return errors

"""Error feedback: each column's rounding error is passed on to the columns not yet rounded.

The layer's output error is `tr((D - Dq) H (D - Dq)^T)` with the inputs' second moment `H = X^T X / n`.
Rounding the columns one after another and correcting the rest by the inverse Cholesky factor of `H`
minimises it greedily (GPTQ, arXiv 2210.17323, section 3). Two choices are ours: the scales are fixed
beforehand, so that columns can be taken in order of falling energy whatever their group; and the salient
channels come last, so that they absorb in 16 bit what all the others leave behind (`refit` finds their values).
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from meswitch.codec.quantize import expand_scale

COLUMNS = 128
_TINY = torch.finfo(torch.float32).tiny


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """The second moment with `damping` times its mean diagonal added to the diagonal: positive definite."""
    shift = damping * second_moment.diagonal().mean() + torch.finfo(torch.float32).tiny
    metric = second_moment.clone()
    metric.diagonal().add_(shift)
    return metric


def inverse_factor(metric: Tensor, order: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped second moment, its channels permuted by `order`.

    Args:
        metric: [in_features, in_features] float32, symmetric, positive definite.
        order: [in_features] int64, a permutation.

    Returns:
        [in_features, in_features] float32, upper triangular; the identity where `metric` is too ill-conditioned
        for float32 even with more damping: then there is no feedback.
    """
    matrix = metric[order][:, order]
    for extra in (0.0, 0.01, 0.1, 1.0):
        lower, info = torch.linalg.cholesky_ex(damped(matrix, extra))
        if int(info) == 0:
            factor, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0:
                return factor
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def feedback_codes(
    delta: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int | None,
    factor: Tensor,
    order: Tensor,
    exact: int,
) -> Tensor:
    """Codes with error feedback.

    Args:
        delta: [out_features, in_features] float32.
        scale: [out_features, groups], fixed beforehand.
        factor: what `inverse_factor` gave for `order`.
        order: [in_features] int64; the last `exact` channels are not rounded.
        exact: number of salient channels.

    Returns:
        [out_features, in_features] uint8.
    """
    top = 2**bits - 1
    width = delta.shape[1]
    # transposed: a step of the loop then reads and writes whole rows
    target = delta.T[order].contiguous()
    step = expand_scale(scale.to(torch.float32), width, group_size).T[order].contiguous()
    codes = torch.empty_like(target, dtype=torch.uint8)
    rounded = width - exact
    round_some, columns = _rounding(delta.device)
    for start in range(0, rounded, columns):
        stop = min(start + columns, rounded)
        factor_here = factor[start:stop, start:stop]
        errors = round_some(target[start:stop], step[start:stop], factor_here, top, codes[start:stop])
        target[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    codes[rounded:] = (target[rounded:] * _half(step[rounded:]) + top / 2).round_().clamp_(0, top)
    back = torch.empty_like(order)
    back[order] = torch.arange(width, device=order.device)
    return codes[back].T.contiguous()


def round_columns(target: Tensor, step: Tensor, factor: Tensor, top: int, codes: Tensor) -> Tensor:
    """Round columns, each after the errors of those before it.

    Args:
        target: [columns, out_features] float32; changed.
        step: of the same shape, the scales.
        factor: [columns, columns] float32, upper triangular.
        codes: [columns, out_features] uint8; filled.

    Returns:
        [columns, out_features] float32, the errors for the columns that follow.
    """
    half, chosen, errors = _half(step), torch.empty_like(target), torch.empty_like(target)
    for column in range(len(target)):
        code, error = chosen[column], errors[column]
        torch.mul(target[column], half[column], out=code).add_(top / 2).round_().clamp_(0, top)
        torch.addcmul(target[column] + top * step[column], code, step[column], value=-2, out=error)
        error.div_(factor[column, column])
        target[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    codes.copy_(chosen)
    return errors


def _half(step: Tensor) -> Tensor:
    return torch.where(step > _TINY, 0.5 / step, 0.0)


def _rounding(device: torch.device) -> tuple[Callable[[Tensor, Tensor, Tensor, int, Tensor], Tensor], int]:
    """What rounds columns on a device, and how many of them at once."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from meswitch.codec import feedback_triton

        return feedback_triton.round_columns, feedback_triton.COLUMNS
    return round_columns, COLUMNS

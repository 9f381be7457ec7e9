"""Codes and scales for a layer's inputs: error feedback, and least-squares scales for the codes that it chose.

Each column's rounding error is passed on to the columns not yet rounded. The layer's output error is
`tr((D - Dq) H (D - Dq)^T)` with the inputs' second moment `H = X^T X / n`. Rounding the columns one after another and
correcting the rest minimises it greedily (GPTQ, arXiv 2210.17323, section 3). With the
upper triangular `U U^T = H` it is `||(D - Dq) U||^2`, whose column j sees the errors of columns up to j only; so
column j is rounded to where it undoes what those before it have left. That is GPTQ's own choice without the inverse of
`H`, whose factor is the inverse of `U`.

Two choices are ours: the scales are fixed beforehand, so that columns can be taken in order of falling energy whatever
their group; and the salient channels come last, so that they absorb in 16 bit what all the others leave behind
(`refit` finds their values).

Once the codes are fixed, a row of the restored delta is linear in its scales and salient weights: `Dq = B theta` with
one column of `B` a group (the row's levels there) and one a salient channel. The output error is then least at
`theta = (B^T H B)^-1 B^T H d`, a small system for every row, solved exactly (`refit`). It is the last half-step of
alternating least squares, in the metric of the layer's inputs.
"""

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from meswitch.codec.quantize import SCALE_DTYPE, group_count, levels
from meswitch.cpu import rough_product

COLUMNS = 128
_PANEL = 8  # columns that are corrected one by one; those after them by one product for all
_TINY = torch.finfo(torch.float32).tiny
_INVERTED = 256  # columns of a triangle that is inverted in one piece

# target, original, step, factor, top, codes -> errors: see `round_columns_on_host`
Rounding = Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor], Tensor]
_BLOCK = {"cpu": 1 << 25, "cuda": 1 << 28}  # numbers in the largest temporary
_RIDGE = 1e-6


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """The second moment with `damping` times its mean diagonal added to the diagonal: positive definite."""
    shift = damping * second_moment.diagonal().mean() + torch.finfo(torch.float32).tiny
    metric = second_moment.clone()
    metric.diagonal().add_(shift)
    return metric


def upper_factor(metric: Tensor, order: Tensor) -> Tensor:
    """Upper triangular `U` with `U U^T` the damped second moment, its channels permuted by `order`.

    Args:
        metric: [in_features, in_features] float32, symmetric, positive definite.
        order: [in_features] int64, a permutation.

    Returns:
        [in_features, in_features] float32; the identity where `metric` is too ill-conditioned for float32 even with
        more damping: then there is no feedback.
    """
    backwards = order.flip(0)
    matrix = metric.index_select(0, backwards).index_select(1, backwards)
    for extra in (0.0, 0.01, 0.1, 1.0):
        lower, info = torch.linalg.cholesky_ex(damped(matrix, extra) if extra else matrix)
        if int(info) == 0:
            return lower.flip(0, 1)
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def inverse_factor(metric: Tensor, order: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse, for what needs that: arguments and result as of `upper_factor`."""
    return _inverse(upper_factor(metric, order))


def _inverse(upper: Tensor) -> Tensor:
    """Of a triangle, by halves: mostly products."""
    size = len(upper)
    if size <= _INVERTED:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, identity, upper=True)
    half = size // 2
    inverse = torch.zeros_like(upper)
    inverse[:half, :half], inverse[half:, half:] = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ (upper[:half, half:] @ inverse[half:, half:])
    return inverse


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
        factor: what `upper_factor` gave for `order`.
        order: [in_features] int64; the last `exact` channels are not rounded.
        exact: number of salient channels.

    Returns:
        [out_features, in_features] uint8.
    """
    top = 2**bits - 1
    width = delta.shape[1]
    # transposed: a step of the loop then reads and writes whole rows
    errors = delta.index_select(1, order).T.contiguous()  # of columns that are rounded; the delta of the others
    step = scale.to(torch.float32).T.contiguous()[order // (group_size or width)]
    share = factor / factor.diagonal()  # of a column's error, what the target of a later one takes
    codes = torch.empty_like(errors, dtype=torch.uint8)
    rounded = width - exact
    round_some, columns = _rounding(delta.device)
    for start in range(0, rounded, columns):
        some = slice(start, min(start + columns, rounded))
        target = _target(errors, share, some)
        errors[some] = round_some(target, errors[some], step[some], share[some, some], top, codes[some])
    target = _target(errors, share, slice(rounded, width))
    codes[rounded:] = (target * _half(step[rounded:]) + top / 2).round_().clamp_(0, top)
    back = torch.empty_like(order)
    back[order] = torch.arange(width, device=order.device)
    return codes.index_select(0, back).T.contiguous()


def _target(errors: Tensor, share: Tensor, some: slice) -> Tensor:
    """What columns are to be rounded to: their delta, and what those before them have left."""
    target = errors[some].clone()
    return rough_product(share[: some.start, some].T, errors[: some.start], onto=target) if some.start else target


def round_columns_on_host(
    target: Tensor, original: Tensor, step: Tensor, share: Tensor, top: int, codes: Tensor
) -> Tensor:
    """Round columns, each after the errors of those before it. On the CPU.

    NumPy takes a microsecond where PyTorch takes four to start on a column.

    Args:
        target: [columns, out_features] float32, what columns before these have left added; changed.
        original: of the same shape, the columns themselves.
        step: of the same shape, the scales.
        share: [columns, columns] float32, upper triangular, of unit diagonal.
        codes: [columns, out_features] uint8; filled.

    Returns:
        [columns, out_features] float32, the errors: the columns less what their codes stand for.
    """
    errors, chosen = torch.empty_like(target), torch.empty_like(target)
    half, twice, base = _half(step).numpy(), (2 * step).numpy(), torch.add(original, step, alpha=top).numpy()
    left, found, missed, shares = target.numpy(), chosen.numpy(), errors.numpy(), share.contiguous().numpy()
    passed = np.empty((_PANEL, target.shape[1]), dtype=np.float32)
    for start in range(0, len(target), _PANEL):
        stop = min(start + _PANEL, len(target))
        if start:
            target[start:stop].addmm_(share[:start, start:stop].T, errors[:start])
        for column in range(start, stop):
            code, error, later = found[column], missed[column], stop - column - 1
            np.multiply(left[column], half[column], out=code)
            code += top / 2
            np.rint(code, out=code)
            np.maximum(code, 0, out=code)
            np.minimum(code, top, out=code)
            np.multiply(code, twice[column], out=error)
            np.subtract(base[column], error, out=error)
            if later:
                np.multiply(shares[column, column + 1 : stop, None], error, out=passed[:later])
                left[column + 1 : stop] += passed[:later]
    codes.copy_(chosen)
    return errors


def _half(step: Tensor) -> Tensor:
    return torch.where(step > _TINY, 0.5 / step, 0.0)


def _rounding(device: torch.device) -> tuple[Rounding, int]:
    """What rounds columns on a device, and how many of them at once."""
    if device.type == "cpu":
        return round_columns_on_host, COLUMNS
    if importlib.util.find_spec("triton") is None:
        return _round_from_device, COLUMNS
    from meswitch.codec import feedback_triton

    return feedback_triton.round_columns, feedback_triton.COLUMNS


def _round_from_device(
    target: Tensor, original: Tensor, step: Tensor, share: Tensor, top: int, codes: Tensor
) -> Tensor:
    """`round_columns_on_host` of a GPU's tensors, where Triton is not installed."""
    found = codes.cpu()
    errors = round_columns_on_host(target.cpu(), original.cpu(), step.cpu(), share.cpu(), top, found)
    codes.copy_(found)
    return errors.to(target.device)


def refit(
    delta: Tensor, codes: Tensor, bits: int, group_size: int | None, salient: Tensor, metric: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve for the scales and the salient weights.

    Args:
        delta: [rows, in_features] float32.
        codes: [rows, in_features] uint8.
        salient: [k] int64.
        metric: [in_features, in_features] float32, the damped second moment of the inputs.
        scale: [rows, groups], kept for rows whose solution is not usable (a negative or infinite scale).

    Returns:
        scales [rows, groups] bfloat16, and salient weights [rows, k] float32: what the codes miss in these channels.
    """
    width = delta.shape[1]
    groups = group_count(width, group_size)
    rows = max(1, _BLOCK.get(delta.device.type, _BLOCK["cpu"]) // (groups * width))
    parts = [
        _refit(d, c, bits, group_size or width, salient, metric, s)
        for d, c, s in zip(delta.split(rows), codes.split(rows), scale.split(rows), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _refit(
    delta: Tensor, codes: Tensor, bits: int, size: int, salient: Tensor, metric: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    rows, width = delta.shape
    spans = [slice(start, min(start + size, width)) for start in range(0, width, size)]
    groups, k = len(spans), salient.numel()
    units = levels(codes, bits)
    outer, inner = metric[:, salient], metric[salient][:, salient]
    normal = delta.new_empty(rows, groups + k, groups + k)  # B^T H B
    normal[:, groups:, groups:] = inner
    right = delta.new_empty(rows, groups + k)  # B^T H d
    right[:, groups:] = of_salient = delta @ outer
    for i, span in enumerate(spans):
        moved = rough_product(units[:, span], metric[span])
        right[:, i] = torch.linalg.vecdot(moved, delta)
        normal[:, i, :groups] = _sums(moved.mul_(units), size)
        normal[:, i, groups:] = normal[:, groups:, i] = units[:, span] @ outer[span]
    crossed = normal[:, :groups, groups:].clone()  # what a group moves in the salient channels
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    solution, failed = torch.linalg.solve_ex(normal, right)
    found = solution[:, :groups].to(SCALE_DTYPE)
    usable = (found.isfinite() & (found >= 0)).all(-1, keepdim=True) & (failed == 0)[:, None]
    usable &= (scale > 0).any(-1, keepdim=True)  # a row without any change stays exactly so
    scales = torch.where(usable, found, scale)
    # the salient weights once more, exactly, for the scales as they are rounded
    residual = of_salient - (scales.float()[:, :, None] * crossed).sum(1)
    return scales, torch.linalg.solve(inner, residual.T).T if k else residual


def _sums(values: Tensor, size: int) -> Tensor:
    """[rows, width] -> [rows, groups], the sum of each group of `size`."""
    rows, width = values.shape
    whole = width - width % size
    sums = values[:, :whole].view(rows, -1, size).sum(-1)
    return sums if whole == width else torch.cat([sums, values[:, whole:].sum(-1, keepdim=True)], 1)

"""Least-squares scales and salient weights for codes that are already chosen.

Once the codes are fixed, a row of the restored delta is linear in its scales and salient weights: `Dq = B theta` with
one column of `B` a group (the row's levels there) and one a salient channel. The output error is then least at
`theta = (B^T H B)^-1 B^T H d`, a small system for every row, solved exactly. It is the last half-step of alternating
least squares, in the metric of the layer's inputs.
"""

import torch
from torch import Tensor

from meswitch.codec.quantize import SCALE_DTYPE, group_count, levels
from meswitch.cpu import rough_product

_BLOCK = {"cpu": 1 << 25, "cuda": 1 << 28}  # numbers in the largest temporary
_RIDGE = 1e-6


def refit(
    delta: Tensor, codes: Tensor, bits: int, group_size: int | None, salient: Tensor, metric: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve for the scales and the salient weights.

    Args:
        delta: [rows, in_features] float32. codes: [rows, in_features] uint8. salient: [k] int64.
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

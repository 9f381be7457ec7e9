"""The expert op on a CPU: one table look-up unpacks a whole byte of codes.

A byte holds 8, 4 or 2 codes of 1, 2 or 4 bits; a [256, codes] table turns it into their levels in one gather. Three
bits straddle bytes and take the reference's way.
"""

from functools import cache

import torch
from torch import Tensor

from meswitch.codec import PackedDelta
from meswitch.ops import reference


def expert_matmul(x: Tensor, delta: PackedDelta) -> Tensor:
    """`x @ D^T` for one expert's tokens: [tokens, in_features] -> [tokens, rows] float32."""
    if delta.bits == 3:
        return reference.expert_matmul(x, delta)
    x = x.float()
    weights = _levels(delta.packed, delta.bits, delta.in_features)
    if delta.group_size is None:
        y = (x @ weights.T) * delta.scale.float().T
    else:
        y = x @ _scaled(weights, delta.scale, delta.group_size).T
    if delta.salient_index.numel():
        y += x[:, delta.salient_index.long()] @ delta.salient_weight.float().T
    return y


def expert_rows(ids: Tensor, delta: PackedDelta) -> Tensor:
    """Rows of D: [tokens] int64 -> [tokens, in_features] float32."""
    return reference.expert_rows(ids, delta)


def _levels(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """[rows, words] int32 -> [rows, in_features] float32 odd integers."""
    codes = packed.contiguous().view(torch.uint8).view(-1).int()
    table = _table(bits)
    return torch.nn.functional.embedding(codes, table).view(packed.shape[0], -1)[:, :in_features]


@cache
def _table(bits: int) -> Tensor:
    """[256, 8 / bits] float32: the levels of every byte's codes, lowest bits first."""
    shifts = torch.arange(0, 8, bits)
    codes = (torch.arange(256)[:, None] >> shifts) & (2**bits - 1)
    return codes.float() * 2 - (2**bits - 1)


def _scaled(weights: Tensor, scale: Tensor, group_size: int) -> Tensor:
    rows, width = weights.shape
    if width % group_size:
        return weights * scale.float().repeat_interleave(group_size, dim=1)[:, :width]
    return (weights.view(rows, -1, group_size) * scale.float()[:, :, None]).view(rows, width)

"""The expert op on a CPU: one table look-up unpacks a whole byte of codes.

A byte holds 8, 4 or 2 codes of 1, 2 or 4 bits; a [256, codes] table turns it into their levels in one gather. Three
bits straddle bytes and take the reference's way. In the kernels' layout (`ops.layout`) no code straddles a byte.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from meswitch.codec import Delta, LowRankDelta
from meswitch.ops.layout import SALIENT_ROWS, Shape, slot_shape
from meswitch.ops.reference import Reference, expand


class Cpu(Reference):
    """As the reference, several times as fast."""

    def expert_matmul(self, x: Tensor, delta: Delta) -> Tensor:
        """As `Reference.expert_matmul`."""
        if isinstance(delta, LowRankDelta) or delta.bits == 3:
            return super().expert_matmul(x, delta)
        x = x.float()
        weights = _levels(delta.packed, delta.bits, delta.in_features)
        if delta.group_size is None:
            y = (x @ weights.T) * delta.scale.float().T
        else:
            y = x @ _scaled(weights, delta.scale, delta.group_size).T
        if delta.salient_index.numel():
            y += expand(x[:, delta.salient_index.long()], delta.salient_weight)
        return y

    def slot_matmul(
        self, x: Tensor, arena: Tensor, row: Sequence[int], rows: int, in_features: int, group: int
    ) -> Tensor | None:
        """As `Reference.slot_matmul`."""
        matrix = slot_matrix(arena, row, rows, in_features, group)
        return None if matrix is None else x.float() @ matrix.T


def slot_matrix(arena: Tensor, row: Sequence[int], rows: int, in_features: int, group: int) -> Tensor | None:
    """The delta that a table's row points at, restored: [rows, in_features] float32; None for an absent one."""
    found = slot_shape(row, rows, in_features, group)
    if found is None:
        return None
    shape, first = found
    parts = shape.views(arena[first : first + shape.nbytes])
    weights = torch.zeros(rows, in_features)
    for plane in range(shape.planes[0]):
        weights += 4.0**plane * _plane(parts["two"][plane], 2, shape)
    if shape.planes[1]:
        weights += 4.0 ** shape.planes[0] * _plane(parts["one"][0], 1, shape)
    if shape.group:
        weights = _scaled(weights, parts["scale"].T, shape.group)
    else:
        weights *= parts["scale"].T.float()
    if shape.salient:
        for tile, own in enumerate(parts["salient"].split(SALIENT_ROWS)):
            first = tile * SALIENT_ROWS
            weights[first : first + len(own)].index_add_(1, parts["index"][tile].long(), own.float())
    return weights


def _plane(words: Tensor, bits: int, shape: Shape) -> Tensor:
    """[blocks, rows, 16] int32 -> [rows, in_features] float32, the levels of one plane: see `ops.layout`."""
    blocks, rows, width = words.shape
    codes = words.contiguous().view(torch.uint8).view(-1).int()
    # byte i of word j has the codes d of channel 16 d + j, the lowest d first
    levels = torch.nn.functional.embedding(codes, _table(bits)).view(blocks, rows, width, 32 // bits)
    return levels.permute(1, 0, 3, 2).reshape(rows, -1)[:, : shape.in_features]


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

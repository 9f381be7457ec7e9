"""The fp32 reference of the expert op: readable, exact, on any device."""

import torch
from torch import Tensor

from meswitch.codec import Delta, LowRankDelta


def expert_matmul(x: Tensor, delta: Delta) -> Tensor:
    """What one expert's delta adds for its tokens: `x @ D^T`.

    Args:
        x: [tokens, in_features] any float dtype.

    Returns:
        [tokens, rows] float32.
    """
    return lowrank_matmul(x, delta) if isinstance(delta, LowRankDelta) else x.float() @ delta.dequantize().T


def lowrank_matmul(x: Tensor, delta: LowRankDelta) -> Tensor:
    """`x @ D^T` of a single matrix by two thin products: [tokens, in_features] -> [tokens, rows] float32."""
    return expand(x.float() @ delta.right.float().T * delta.scale, delta.left)


def expand(narrow: Tensor, left: Tensor) -> Tensor:
    """The 16-bit part of a delta, from what it needs of its inputs.

    Args:
        narrow: [tokens, rank] float32: the salient input channels, or a low-rank pair's inner values.
        left: [rows, rank] any float dtype.

    Returns:
        [tokens, rows] float32.
    """
    return narrow @ left.float().T


def expert_rows(ids: Tensor, delta: Delta) -> Tensor:
    """What one expert's delta adds to the embeddings of tokens: rows of D.

    Args:
        ids: [tokens] int64 < delta.rows.

    Returns:
        [tokens, in_features] float32.
    """
    return torch.zeros(0, delta.in_features) if not len(ids) else delta.dequantize(ids)

"""The fp32 reference of the expert op: readable, exact, on any device."""

import torch
from torch import Tensor

from meswitch.codec import PackedDelta


def expert_matmul(x: Tensor, delta: PackedDelta) -> Tensor:
    """What one expert's delta adds for its tokens: `x @ D^T`.

    Args:
        x: [tokens, in_features] any float dtype.

    Returns:
        [tokens, rows] float32.
    """
    return x.float() @ delta.dequantize().T


def expert_rows(ids: Tensor, delta: PackedDelta) -> Tensor:
    """What one expert's delta adds to the embeddings of tokens: rows of D.

    Args:
        ids: [tokens] int64 < delta.rows.

    Returns:
        [tokens, in_features] float32.
    """
    return torch.zeros(0, delta.in_features) if not len(ids) else delta.dequantize(ids)

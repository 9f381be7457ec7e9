"""The fp32 reference of the expert op: readable, exact, on any device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from meswitch.codec import Delta, LowRankDelta
from meswitch.ops.layout import read_slot


class Reference:
    """A backend that restores each expert's delta and multiplies with it."""

    def expert_matmul(self, x: Tensor, delta: Delta) -> Tensor:
        """What one expert's delta adds for its tokens: `x @ D^T`.

        Args:
            x: [tokens, in_features] any float dtype.

        Returns:
            [tokens, rows] float32.
        """
        return lowrank_matmul(x, delta) if isinstance(delta, LowRankDelta) else x.float() @ delta.dequantize().T

    def expert_rows(self, ids: Tensor, delta: Delta) -> Tensor:
        """What one expert's delta adds to the embeddings of tokens: rows of D.

        Args:
            ids: [tokens] int64 < delta.rows.

        Returns:
            [tokens, in_features] float32.
        """
        return torch.zeros(0, delta.in_features) if not len(ids) else delta.dequantize(ids)

    def slot_matmul(
        self, x: Tensor, arena: Tensor, row: Sequence[int], rows: int, in_features: int, group: int
    ) -> Tensor | None:
        """`x @ D^T` of a delta that lies as the GPU kernels read it.

        Args:
            x: [tokens, in_features] any float dtype.
            arena: where it lies, see `layout.SlotLinear`.
            row: of the table, which points at it.
            rows: of the layer.
            in_features: of the layer.
            group: input channels of a scale, see `layout.Shape`.

        Returns:
            [tokens, rows] float32; None for an absent delta.
        """
        delta = read_slot(arena, row, rows, in_features, group)
        return None if delta is None else self.expert_matmul(x, delta)


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

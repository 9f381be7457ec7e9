"""One delta matrix as a product of two thin ones: what a LoRA adapter is."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """The delta `scale * left @ right` of one [rows, in_features] matrix, or of a stack of matrices below one another.

    Args:
        left: [rows, rank], any float dtype.
        right: [rank, in_features], any float dtype; of a stack [matrices * rank, in_features].
        scale: the factor; kept apart, so that both matrices are those that were trained.
        extra: [extra_rows, in_features] rows after the base's last one, whole weights; None if there are none.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    extra: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.left.shape[0]

    @property
    def in_features(self) -> int:
        return self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def matrices(self) -> int:
        """How many lie below one another, each with a `right` of its own."""
        return self.right.shape[0] // self.rank if self.rank else 1

    def to(self, device: torch.device) -> "LowRankDelta":
        """The same delta on a device."""
        extra = None if self.extra is None else self.extra.to(device)
        return LowRankDelta(self.left.to(device), self.right.to(device), self.scale, extra)

    def tensors(self) -> dict[str, Tensor]:
        """By the suffix of their stored names. Rows of `left` that are all zero are left out if that saves bytes."""
        live = (self.left != 0).any(1)
        kept = int(live.sum())
        saved = (self.rows - kept) * self.rank * self.left.element_size()
        named = {"weight_left": self.left, "weight_right": self.right}
        if saved > kept * torch.int32.itemsize:
            index = live.nonzero().squeeze(1).to(torch.int32)
            named |= {"weight_left": self.left[index.long()], "row_index": index}
        if self.extra is not None:
            named["weight_extra"] = self.extra
        return named

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """The delta in float32, extra rows not included.

        Args:
            rows: [n] int64 to restore only these; None restores all.

        Returns:
            [rows, in_features] float32.
        """
        left = self.left if rows is None else self.left[rows]
        right = self.right.float()
        # the factor last, as PEFT merges: then the result is the same to the last bit
        if self.matrices == 1:
            return (left.float() @ right) * self.scale
        if rows is not None:
            raise ValueError("rows of a stack are not restored one by one")
        parts = left.float().view(self.matrices, -1, self.rank) @ right.view(self.matrices, self.rank, -1)
        return parts.view(self.rows, -1) * self.scale

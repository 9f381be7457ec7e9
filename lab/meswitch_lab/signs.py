"""Training of methods that store signs: the signs stay, their scales move."""

import dataclasses

import torch
from torch import Tensor, nn

from meswitch.codec import CodedDelta, Group
from meswitch.compression.options import TrainingRecipe

ROW, COLUMN = 0, 1  # the axis of the scales, as `per-axis` records it


class TrainableSigns(nn.Module):
    """Base + signs x scale, with trainable scales (`meswitch.codec.Trainable`).

    Args:
        part: name of the stored scales.
        base: [at least delta.rows, in_features].
        delta: signs and scales, as they are stored.
        recipe: `relative` trains the scale's change as a share of it, not the scale itself.
        device: where it is trained.
        dtype: that the model computes in.
    """

    def __init__(
        self,
        part: str,
        base: Tensor,
        delta: CodedDelta,
        recipe: TrainingRecipe,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.delta, self.part, self.relative = delta, part, recipe.relative
        stored = delta.parts[part]
        ones = dataclasses.replace(delta, parts=dict(delta.parts) | {part: torch.ones_like(stored)})
        self.signs = ones.dequantize().to(device, torch.int8)
        self.base = base[: delta.rows].to(device, dtype)
        self.extra = None if delta.extra is None else delta.extra.to(device, dtype)
        self.start = stored.to(device, torch.float32)
        self.step = nn.Parameter(torch.zeros_like(self.start) if recipe.relative else self.start.clone())

    @property
    def scale(self) -> Tensor:
        return self.start * (1 + self.step) if self.relative else self.step

    def groups(self) -> list[Group]:
        return [([self.step], 1.0)]

    def matrix(self) -> Tensor:
        scale = self.scale[:, None] if self.delta.meta.get("axis") == ROW else self.scale
        matrix = self.base + (self.signs * scale).to(self.base.dtype)
        return matrix if self.extra is None else torch.cat([matrix, self.extra])

    def trained(self) -> CodedDelta:
        stored = self.delta.parts[self.part]
        parts = dict(self.delta.parts) | {self.part: self.scale.detach().cpu().to(stored.dtype)}
        return dataclasses.replace(self.delta, parts=parts)

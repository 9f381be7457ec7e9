"""What distillation trains of the methods that store signs: their scales, one a matrix, a row or a column."""

import dataclasses

import torch
from torch import Tensor, nn

from meswitch.codec import CodedDelta
from meswitch.codec.baselines.per_axis import ROW
from meswitch.compression.trainable import Group
from meswitch.errors import ConfigError


class RestoredSigns(nn.Module):
    """Base + signs x scale, with trainable scales.

    Args:
        base: [at least delta.rows, in_features].
        relative: train the scale's change as a share of it, not the scale itself.

    Raises:
        ConfigError: the method has no scales that can be trained.
    """

    def __init__(
        self, base: Tensor, delta: CodedDelta, relative: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        name = delta.baseline.scale
        if name is None:
            raise ConfigError(f"distill: the method {delta.baseline.name} has no scales to train")
        self.delta, self.name, self.relative = delta, name, relative
        stored = delta.parts[name]
        ones = dataclasses.replace(delta, parts=dict(delta.parts) | {name: torch.ones_like(stored)})
        self.signs = ones.dequantize().to(device, torch.int8)
        self.base = base[: delta.rows].to(device, dtype)
        self.extra = None if delta.extra is None else delta.extra.to(device, dtype)
        self.start = stored.to(device, torch.float32)
        self.step = nn.Parameter(torch.zeros_like(self.start) if relative else self.start.clone())

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
        stored = self.delta.parts[self.name]
        parts = dict(self.delta.parts) | {self.name: self.scale.detach().cpu().to(stored.dtype)}
        return dataclasses.replace(self.delta, parts=parts)

"""What distillation trains of a matrix: the interface, and its implementation for packed deltas."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from meswitch.codec import CodedDelta, PackedDelta, pack, unpack
from meswitch.codec.delta import SALIENT_DTYPE
from meswitch.codec.quantize import SCALE_DTYPE, expand_scale, levels

CODES_RATE = 0.5  # the steps of latent weights, whose levels are 2 apart, against those of scales
_WITHIN = 0.9  # of a level: half the distance to the next is 1
# parameters, and the factor by which the recipe's learning rate is theirs
Group = tuple[list[nn.Parameter], float]


class Trainable(Protocol):
    """A matrix of the student; the classes are modules, so that their parameters move with the model."""

    def groups(self) -> list[Group]:
        """What to train."""

    def matrix(self) -> Tensor:
        """[rows + extra, in_features] in the base's compute dtype, differentiable."""

    def trained(self) -> PackedDelta | CodedDelta:
        """The delta as it is to be stored, in the shapes and dtypes it had."""


class RestoredPacked(nn.Module):
    """Base + levels x scales + salient, with trainable scales and salient weights, and codes if they are to be trained.

    Scales and salient weights are trained as steps relative to their start, so that one learning rate fits all. Codes
    are trained through a latent weight for each, in units of its group's scale: the nearest level is used, and its
    gradient is the latent weight's while that is within the range of levels (a straight-through estimator,
    arXiv 1308.3432; learning codes together with scales follows LSQ, 1902.08153). A latent weight starts at the full
    delta, moved no further than needed for its level to be the code that error feedback chose.

    Args:
        base: [at least delta.rows, in_features].
        full: of the same shape, the expert's own weights; None leaves the codes as they are.
    """

    def __init__(
        self, base: Tensor, delta: PackedDelta, full: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.delta = delta
        self.base = base[: delta.rows].to(device, dtype)
        self.top = 2**delta.bits - 1
        self.start = delta.scale.to(device, torch.float32)
        self.salient_index = delta.salient_index.long().to(device)
        self.salient_start = delta.salient_weight.to(device, torch.float32)
        # relative to the root mean square of all salient weights: single ones may be near zero
        self.salient_unit = self.salient_start.square().mean().sqrt() if self.salient_start.numel() else 0.0
        self.extra = None if delta.extra is None else delta.extra.to(device, dtype)
        self.scale_step = nn.Parameter(torch.zeros_like(self.start))
        self.salient_step = nn.Parameter(torch.zeros_like(self.salient_start))
        # rows left out of the artifact stay so
        self.live = ((self.start != 0).any(1) | (self.salient_start != 0).any(1))[:, None].float()
        codes = levels(unpack(delta.packed, delta.bits, delta.in_features), delta.bits).to(device)
        self.levels = codes.to(torch.int8)
        self.latent = None if full is None else nn.Parameter(self._latent(full[: delta.rows].to(device), codes))

    def _latent(self, full: Tensor, codes: Tensor) -> Tensor:
        """[rows, in_features] float32: the full delta in units of the scales, kept within its code's interval."""
        change = full.float() - self.base.float()
        if self.salient_index.numel():
            change.index_add_(1, self.salient_index, -self.salient_start)
        step = expand_scale(self.start, codes.shape[1], self.delta.group_size)
        rest = torch.where(step > 0, change / step - codes, 0.0)
        return codes + rest.clamp(-_WITHIN, _WITHIN)

    @property
    def scale(self) -> Tensor:
        return self.start * (1 + self.scale_step)

    @property
    def salient(self) -> Tensor:
        return self.salient_start + self.salient_unit * self.salient_step * self.live

    def groups(self) -> list[Group]:
        # every bit halves the error that training is to repair, and what steps of one size do harm besides
        rate = 2.0 ** (1 - self.delta.bits)
        found: list[Group] = [([self.scale_step, self.salient_step], rate)]
        return found if self.latent is None else [*found, ([self.latent], CODES_RATE * rate)]

    def matrix(self) -> Tensor:
        trained = self.levels if self.latent is None else self.latent
        matrix = _Restored.apply(
            trained, self.scale, self.salient, self.base, self.salient_index, self.delta.group_size, self.top
        )
        return matrix if self.extra is None else torch.cat([matrix, self.extra])

    def trained(self) -> PackedDelta:
        delta = self.delta
        packed = delta.packed
        if self.latent is not None:
            codes = (_nearest(self.latent.detach(), self.top) + self.top) / 2
            packed = pack(codes.to(torch.uint8).cpu(), delta.bits)
        return PackedDelta(
            packed,
            self.scale.detach().cpu().to(SCALE_DTYPE),
            delta.salient_index,
            self.salient.detach().cpu().to(SALIENT_DTYPE),
            delta.bits,
            delta.group_size,
            delta.in_features,
            delta.extra,
        )


def _nearest(latent: Tensor, top: int) -> Tensor:
    """The level (odd integer in [-top, top]) nearest to each latent weight."""
    return latent.add(top).div_(2).round_().clamp_(0, top).mul_(2).sub_(top)


class _Restored(torch.autograd.Function):
    """base + nearest levels x scales + salient, in few passes: every step does it for every matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        scale: Tensor,
        salient: Tensor,
        base: Tensor,
        index: Tensor,
        group: int | None,
        top: int,
    ) -> Tensor:
        chosen = _nearest(latent, top) if latent.is_floating_point() else latent.float()
        ctx.save_for_backward(latent, chosen, scale, index)
        ctx.group, ctx.top = group, top
        matrix = _scaled(chosen, scale, group)
        matrix = matrix.add_(base) if base.dtype == matrix.dtype else base + matrix.to(base.dtype)
        return matrix.index_add_(1, index, salient.to(matrix.dtype)) if index.numel() else matrix

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        latent, chosen, scale, index = ctx.saved_tensors
        gradient = gradients[0].float()
        to_scale = _by_group(gradient * chosen, ctx.group).sum(-1)
        to_latent = None
        if ctx.needs_input_grad[0]:
            edge = float(ctx.top + 1)
            inside = torch.ops.aten.hardtanh_backward(gradient, latent, -edge, edge)  # 0 beyond the edges, in one pass
            to_latent = _scaled(inside, scale, ctx.group)
        return to_latent, to_scale, gradient[:, index], None, None, None, None


def _by_group(values: Tensor, group: int | None) -> Tensor:
    """[rows, in_features] -> [rows, groups, group], the last group filled up with zeros."""
    rows, width = values.shape
    group = width if group is None else group
    if width % group:
        values = torch.nn.functional.pad(values, (0, -width % group))
    return values.reshape(rows, -1, group)


def _scaled(values: Tensor, scale: Tensor, group: int | None) -> Tensor:
    """[rows, in_features] times the scale of each group."""
    return (_by_group(values, group) * scale[:, :, None]).view(len(values), -1)[:, : values.shape[1]]

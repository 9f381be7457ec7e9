"""What computes an expert's part of a layer: the backends, which of them an engine takes, and which one an operator."""

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from meswitch.codec import Delta, LowRankDelta
from meswitch.errors import ConfigError
from meswitch.ops.layout import SALIENT_ROWS, Shape, read_slot, slot_shape

KERNEL_DTYPES = (torch.bfloat16, torch.float16)


class Backend(Protocol):
    """What computes deltas expert by expert; see `Reference` for shapes."""

    def expert_matmul(self, x: Tensor, delta: Delta) -> Tensor: ...

    def expert_rows(self, ids: Tensor, delta: Delta) -> Tensor: ...

    def slot_matmul(
        self, x: Tensor, arena: Tensor, row: Sequence[int], rows: int, in_features: int, group: int
    ) -> Tensor | None: ...


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


class Cpu(Reference):
    """As the reference, several times as fast: one table look-up unpacks a whole byte of codes.

    A byte holds 8, 4 or 2 codes of 1, 2 or 4 bits; a [256, codes] table turns it into their levels in one gather. Three
    bits straddle bytes and take the reference's way. In the kernels' layout (`ops.layout`) no code straddles a byte.
    """

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


BACKENDS: dict[str, Backend] = {"reference": Reference(), "cpu": Cpu()}


def backend(device_type: str, name: str | None = None) -> Backend:
    """The backend for a device, or the one asked for.

    Raises:
        ConfigError: no backend of that name.
    """
    if name is not None:
        if name not in BACKENDS:
            raise ConfigError(f"backend: {name!r} is none of triton, {', '.join(BACKENDS)}")
        return BACKENDS[name]
    return BACKENDS["cpu"] if device_type == "cpu" else BACKENDS["reference"]


def chosen_backend(name: str | None, device: torch.device, operator: str) -> str:
    """`triton`, `cpu` or `reference`: the one asked for, or by the device.

    Raises:
        ConfigError: another is asked for, or `cpu` elsewhere.
    """
    default = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
    name = name or default
    if name not in ("triton", "cpu", "reference"):
        raise ConfigError(f"backend: {name!r} has no {operator}; 'triton', 'cpu' and 'reference' have")
    if name == "cpu" and device.type != "cpu":
        raise ConfigError(f"backend: 'cpu' computes on a CPU, the tensors are on {device}; use {default!r}")
    return name


def uses_kernels(name: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an engine computes deltas by the GPU kernels: asked for by name, or chosen by device and dtype.

    Raises:
        ConfigError: asked for, and they do not take this dtype; the message names a backend that does.
    """
    if name is None:
        return device.type == "cuda" and dtype in KERNEL_DTYPES
    if name == "triton" and dtype not in KERNEL_DTYPES:
        raise ConfigError(
            f"backend: triton: takes bfloat16 and float16, the model is {str(dtype).removeprefix('torch.')}; give a "
            "dtype, or use the backend 'reference'"
        )
    return name == "triton"


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

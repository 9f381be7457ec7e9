"""What every baseline shares: its interface, the delta it stores, and rounding of matrices that are not deltas."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.codec.feedback import damped, feedback_codes, upper_factor
from meswitch.codec.packing import pack, packed_words, unpack
from meswitch.codec.quantize import SCALE_DTYPE, absmax_scales, dequantize, group_count, mse_scales, quantize

Meta = Mapping[str, int]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class Request:
    """What a method is asked for.

    bits: of a code. group_size: values that share a scale, None for a row. budget: bytes that the default method spends
    on this matrix at `bits`, for methods whose size is free. rank: instead of the budget (`svd`). drop: share of
    weights set to zero, seed: of the choice (`dare`). damping: of the second moment.
    """

    bits: int
    group_size: int | None
    budget: int
    rank: int | None = None
    drop: float = 0.9
    seed: int = 0
    damping: float = 0.01


@dataclass(frozen=True, slots=True)
class Baseline:
    """One method as pure functions.

    encode: delta [rows, in_features] float32, second moment of the inputs [in_features, in_features] float32 or None,
    and the request -> stored tensors by suffix, and the integers that `decode` needs.
    decode: those, and the shape -> [rows, in_features] float32.
    shapes: what is stored for a shape and these integers; raises ValueError for integers that make no sense.
    fields: names of the integers. bits: of its codes, if that is not a choice. blocks_only: the paper leaves embedding
    and head whole. uses_inputs: calibration text makes a difference. scale: the part that can be trained end to end, by
    which the signs are multiplied.
    """

    name: str
    encode: Callable[[Tensor, Tensor | None, Request], tuple[dict[str, Tensor], dict[str, int]]]
    decode: Callable[[Mapping[str, Tensor], int, int, Meta], Tensor]
    shapes: Callable[[int, int, Meta], Shapes]
    fields: tuple[str, ...] = ()
    bits: int | None = None
    blocks_only: bool = False
    uses_inputs: bool = False
    scale: str | None = None


@dataclass(frozen=True, slots=True)
class CodedDelta:
    """The delta of one matrix as a baseline stores it; reads like a `PackedDelta`.

    parts: suffix -> tensor, without the extra rows. extra: [extra_rows, in_features] rows after the base's last one.
    """

    baseline: Baseline
    parts: Mapping[str, Tensor]
    meta: Meta
    rows: int
    in_features: int
    extra: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By the suffix of their stored names."""
        return dict(self.parts) | ({} if self.extra is None else {"weight_extra": self.extra})

    def dequantize(self) -> Tensor:
        """The delta without extra rows: [rows, in_features] float32."""
        return self.baseline.decode(self.parts, self.rows, self.in_features, self.meta)


def check(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


def nbytes(shapes: Shapes) -> int:
    """Bytes of tensors of these shapes."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())


def rounded_shapes(rows: int, width: int, bits: int, group_size: int | None, prefix: str) -> Shapes:
    """What `round_matrix` stores: codes of 8 bits are bytes, of 1-4 bits packed words."""
    codes = ((rows, width), torch.uint8) if bits == 8 else ((rows, packed_words(width, bits)), torch.int32)
    return {f"{prefix}_packed": codes, f"{prefix}_scale": ((rows, group_count(width, group_size)), SCALE_DTYPE)}


def round_matrix(
    matrix: Tensor, bits: int, group_size: int | None, prefix: str, moment: Tensor | None = None, damping: float = 0.01
) -> dict[str, Tensor]:
    """Round a [rows, width] float32 matrix in groups along its width, with error feedback if `moment` is given.

    Args:
        moment: [width, width] float32, the second moment of what the matrix is applied to.
    """
    scale = absmax_scales(matrix, bits, group_size) if bits == 8 else mse_scales(matrix, bits, group_size)
    if moment is None:
        codes = quantize(matrix, scale, bits, group_size)
    else:
        order = moment.diagonal().argsort(descending=True, stable=True)
        factor = upper_factor(damped(moment, damping), order)
        codes = feedback_codes(matrix, scale, bits, group_size, factor, order, exact=0)
    return {f"{prefix}_packed": codes if bits == 8 else pack(codes, bits), f"{prefix}_scale": scale}


def restore_matrix(parts: Mapping[str, Tensor], width: int, bits: int, group_size: int | None, prefix: str) -> Tensor:
    """Undo `round_matrix`: [rows, width] float32."""
    stored = parts[f"{prefix}_packed"]
    codes = stored if bits == 8 else unpack(stored, bits, width)
    return dequantize(codes, parts[f"{prefix}_scale"], bits, group_size)


def group_meta(group_size: int | None) -> int:
    """0 stands for one scale a row."""
    return group_size or 0


def group_of(meta: Meta) -> int | None:
    size = meta["group_size"]
    check(size == 0 or size >= 8, f"group_size: {size} is neither 0 (a row) nor at least 8")
    return size or None


def bits_of(meta: Meta) -> int:
    bits = meta["bits"]
    check(bits in (1, 2, 3, 4), f"bits: {bits} is none of 1, 2, 3, 4")
    return bits

"""What the lab's codecs share: a method as pure functions, and rounding of matrices that are not deltas."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.codec import CodecRequest, CodedDelta, Meta, Parameter, Shapes, Sharing, Trainable
from meswitch.codec.feedback import damped, feedback_codes, upper_factor
from meswitch.codec.quantize import (
    SCALE_DTYPE,
    absmax_scales,
    dequantize,
    group_count,
    mse_scales,
    pack,
    packed_words,
    quantize,
    unpack,
)
from meswitch.compression.options import TrainingRecipe

Encoded = tuple[dict[str, Tensor], dict[str, int]]


def _nothing(request: CodecRequest) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Method:
    """A codec (`meswitch.codec.Codec`) made of functions.

    Args:
        name: as the manifest records it.
        encode: delta [rows, in_features] float32, second moment of the inputs [in_features, in_features] float32 or
            None, and the request -> stored tensors by suffix, and the integers that `decode` needs.
        decode: those, and the shape -> [rows, in_features] float32.
        shapes: what is stored for a shape and these integers; raises ValueError for integers that make no sense.
        fields: names of the integers.
        parameters: what can be asked of this method only.
        bits: of its codes, if that is not a choice.
        blocks_only: the paper leaves embedding and head whole.
        uses_inputs: calibration text makes a difference.
        check: refuses requests that cannot be followed, by a ValueError.
        sharing: how it compares matrices before it encodes the first.
        recipe: how it was published to be trained.
        trains: makes the module that is trained; None if nothing can be.
    """

    name: str
    encode: Callable[[Tensor, Tensor | None, CodecRequest], Encoded]
    decode: Callable[[Mapping[str, Tensor], int, int, Meta], Tensor]
    shapes: Callable[[int, int, Meta], Shapes]
    fields: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    bits: int | None = None
    blocks_only: bool = False
    uses_inputs: bool = False
    check: Callable[[CodecRequest], None] = _nothing
    sharing: Sharing | None = None
    recipe: TrainingRecipe | None = None
    trains: Callable[[Tensor, CodedDelta, TrainingRecipe, torch.device, torch.dtype], Trainable] | None = None

    @property
    def is_trainable(self) -> bool:
        return self.trains is not None

    def trainable(
        self, base: Tensor, delta: CodedDelta, recipe: TrainingRecipe, device: torch.device, dtype: torch.dtype
    ) -> Trainable:
        if self.trains is None:
            raise TypeError(f"{self.name} has nothing to train")
        return self.trains(base, delta, recipe, device, dtype)


def check(fits: bool, message: str) -> None:
    """Refuse what does not fit.

    Raises:
        ValueError: with the message.
    """
    if not fits:
        raise ValueError(message)


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

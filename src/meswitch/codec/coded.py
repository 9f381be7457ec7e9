"""A delta as tensors that only its codec reads: what every method but the packed ones stores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from meswitch.codec.delta import PackedDelta, check_finite
from meswitch.codec.lowrank import LowRankDelta
from meswitch.codec.registry import Codec, Meta, Request, find_codec

# parameters, and the factor by which the recipe's learning rate is theirs
Group = tuple[list[nn.Parameter], float]


@dataclass(frozen=True, slots=True)
class CodedDelta:
    """The delta of one matrix as its codec stores it; reads like a `PackedDelta`.

    Args:
        codec: reads `parts`.
        parts: suffix -> tensor, without the extra rows.
        meta: the integers that the codec needs.
        rows: of the base's matrix.
        in_features: its columns.
        extra: [extra_rows, in_features] rows after the base's last one.
    """

    codec: Codec
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
        return self.codec.decode(self.parts, self.rows, self.in_features, self.meta)


class Trainable(Protocol):
    """A matrix that is trained; the classes are modules, so that their parameters move with the model."""

    def groups(self) -> list[Group]:
        """What to train."""

    def matrix(self) -> Tensor:
        """[rows + extra, in_features] in the base's compute dtype, differentiable."""

    def trained(self) -> PackedDelta | LowRankDelta | CodedDelta:
        """The delta as it is to be stored, in the shapes and dtypes it had."""


def encode_coded(
    method: str,
    delta: Tensor,
    request: Request,
    *,
    name: str,
    second_moment: Tensor | None = None,
    extra: Tensor | None = None,
) -> CodedDelta:
    """Compress one delta by a codec.

    Args:
        method: the codec's name.
        delta: [rows, in_features] float32.
        request: what is wanted.
        name: of the tensor, for errors.
        second_moment: [in_features, in_features] float32, `X^T X / n` of the layer's inputs.
        extra: [extra_rows, in_features], stored as it is.

    Raises:
        MeswitchError: the delta has NaN or infinite values.
    """
    check_finite(delta, name)
    codec = find_codec(method)
    parts, meta = codec.encode(delta, second_moment, request)
    return CodedDelta(codec, parts, meta, delta.shape[0], delta.shape[1], extra)


def coded_by(method: str | None, meta: Meta | None) -> Codec:
    """The codec of a stored tensor, its integers complete and known.

    Raises:
        ValueError: an unknown method, an unknown or a missing field.
    """
    codec, given = find_codec(method), set(meta or {})
    for name in sorted(given ^ set(codec.fields)):
        problem = "unknown field" if name in given else "missing field"
        raise ValueError(f"meta.{name}: {problem} of the method {method!r}")
    return codec


def restore_coded(
    method: str | None, meta: Meta | None, parts: Mapping[str, Tensor], rows: int, in_features: int
) -> CodedDelta:
    """A `CodedDelta` over stored parts.

    Args:
        method: the codec's name.
        meta: its integers.
        parts: suffix -> tensor, `weight_extra` among them if there is one.
        rows: those of the base.
        in_features: columns.
    """
    own = {suffix: tensor for suffix, tensor in parts.items() if suffix != "weight_extra"}
    return CodedDelta(coded_by(method, meta), own, meta or {}, rows, in_features, parts.get("weight_extra"))

"""Codecs by name, and the default one. A codec turns the delta of one matrix into named tensors, and back.

`me-switch` is registered here: low-bit codes, scales and salient channels (`codec.delta`) as a codec. Another package
brings a codec by a module that calls `register`, and names the module in its entry point group `meswitch.codecs`: it is
imported when a name is asked for that is not registered yet. So an artifact of another method opens where the package
that brings the method is installed. What such a codec stores is a `CodedDelta`: tensors that only the codec reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from meswitch.codec.delta import PackedDelta, Spec, check_finite, encode, packed_from, stored_shapes, with_all_rows
from meswitch.codec.lowrank import LowRankDelta

ENTRY_POINTS = "meswitch.codecs"
Meta = Mapping[str, int]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
# parameters, and the factor by which the recipe's learning rate is theirs
Group = tuple[list[nn.Parameter], float]


def nbytes(shapes: Shapes) -> int:
    """Bytes of tensors of these shapes."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that only one method takes.

    Args:
        name: as it is given, and recorded in the manifest.
        help: what it does.
        default: None if nothing is recorded where it is not given.
        least: the smallest value.
        most: the largest value.
        below: a value that it must be less than.
        whole: whether it is an integer.
    """

    name: str
    help: str
    default: float | None = None
    least: float = 0.0
    most: float | None = None
    below: float | None = None
    whole: bool = False

    def check(self, value: float) -> None:
        """Refuse a value that makes no sense.

        Raises:
            ValueError: naming parameter, value and bounds.
        """
        fits = value >= self.least and (self.most is None or value <= self.most)
        if not fits or (self.below is not None and value >= self.below) or (self.whole and value != int(value)):
            bounds = [f"at least {self.least:g}"]
            bounds += [] if self.most is None else [f"at most {self.most:g}"]
            bounds += [] if self.below is None else [f"less than {self.below:g}"]
            bounds += ["whole"] if self.whole else []
            raise ValueError(f"{self.name}: {value:g}: {', '.join(bounds)}")


BPW = Parameter(
    "bpw",
    "Bits a weight of every compressed matrix, for methods whose size is free; by default the bytes of me-switch.",
    least=0.01,
    most=16,
)


@dataclass(frozen=True, slots=True)
class CodecRequest:
    """What a codec is asked for.

    Args:
        spec: how the default method would quantise the matrix.
        budget: bytes to spend on the matrix, for methods whose size is free.
        seed: of random choices; every tensor has another one.
        parameters: of this method, by name.
        share: what `Sharing.allocate` found for the matrix; None where the codec does not look at other matrices.
    """

    spec: Spec
    budget: int
    seed: int = 0
    parameters: Mapping[str, float] = field(default_factory=dict)
    share: float | None = None

    @property
    def bits(self) -> int:
        return self.spec.bits

    @property
    def group_size(self) -> int | None:
        return self.spec.group_size

    @property
    def damping(self) -> float:
        return self.spec.damping


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a codec looks at all matrices before it encodes the first.

    Args:
        measure: what it wants to know of a delta [rows, in_features] float32.
        allocate: name -> what was measured and the number of weights, and the method's parameters; gives name ->
            `CodecRequest.share`.
    """

    measure: Callable[[Tensor], float]
    allocate: Callable[[Mapping[str, tuple[float, int]], Mapping[str, float]], dict[str, float]]


class Codec(Protocol):
    """One method of compressing the delta of a matrix, as pure functions of tensors."""

    @property
    def name(self) -> str:
        """As the manifest records it."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the integers that `decode` needs: the keys of `Meta`."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """What can be asked of this method only."""

    @property
    def bits(self) -> int | None:
        """Of a code, if that is not a choice."""

    @property
    def blocks_only(self) -> bool:
        """Whether embedding and head stay whole unless somebody asks for them."""

    @property
    def uses_inputs(self) -> bool:
        """Whether calibration text makes a difference."""

    @property
    def is_trainable(self) -> bool:
        """Whether something of it can be trained end to end."""

    @property
    def recipe(self) -> Any:
        """The `TrainingRecipe` it was published with (`compression.options`); None trains by the default one."""

    @property
    def sharing(self) -> Sharing | None:
        """For methods that treat a matrix by how it compares with the others."""

    def check(self, request: CodecRequest) -> None:
        """Refuse a request that the method cannot follow, whatever the matrix.

        Raises:
            ValueError: naming what is wrong.
        """

    def encode(
        self, delta: Tensor, moment: Tensor | None, request: CodecRequest
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Compress one delta.

        Args:
            delta: [rows, in_features] float32.
            moment: [in_features, in_features] float32, the second moment of the layer's inputs, or None.
            request: what is wanted.

        Returns:
            stored tensors by suffix, and the integers that `decode` needs.
        """

    def decode(self, parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
        """Undo `encode`: [rows, width] float32."""

    def shapes(self, rows: int, width: int, meta: Meta) -> Shapes:
        """What is stored for a matrix of this shape.

        Raises:
            ValueError: integers that make no sense.
        """

    def trainable(
        self, base: Tensor, delta: "CodedDelta", recipe: Any, device: torch.device, dtype: torch.dtype
    ) -> "Trainable":
        """The matrix as a module to be trained; asked for where `is_trainable` says so.

        Args:
            base: [at least rows, in_features].
            delta: as it is stored.
            recipe: how it is trained.
            device: where.
            dtype: that the model computes in.
        """


_CODECS: dict[str, Codec] = {}
_Registered = TypeVar("_Registered", bound=Codec)


def register(codec: _Registered) -> _Registered:
    """Make a codec known under its name.

    Raises:
        ValueError: another one has that name.
    """
    if _CODECS.setdefault(codec.name, codec) is not codec:
        raise ValueError(f"codec {codec.name!r}: another one of that name is registered")
    return codec


def codec_names() -> tuple[str, ...]:
    """All that `find_codec` knows: those that are registered, then those of installed packages."""
    installed = [point.name for point in entry_points(group=ENTRY_POINTS)]
    return tuple(dict.fromkeys([*_CODECS, *installed]))


def find_codec(name: str | None) -> Codec:
    """The codec of this name; the package that brings it is imported if it has not been.

    Raises:
        ValueError: no installed package brings it.
    """
    if name is not None and name not in _CODECS:
        for point in entry_points(group=ENTRY_POINTS, name=name):
            point.load()
    if name is None or name not in _CODECS:
        raise ValueError(
            f"method: {name!r} is none of {', '.join(codec_names())}; install the package that brings it "
            "(other papers' methods are in meswitch_lab)"
        )
    return _CODECS[name]


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
    request: CodecRequest,
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


def _as_asked(spec: Spec) -> Spec:
    return spec


@dataclass(frozen=True, slots=True)
class PackedCodec:
    """A codec whose tensors the kernels read, so that its artifacts can be served.

    Args:
        name: as the manifest records it.
        uses_inputs: whether calibration text makes a difference to the codes.
        adapt: makes the spec of the method from the one that was asked for.
    """

    name: str
    uses_inputs: bool = True
    adapt: Callable[[Spec], Spec] = _as_asked
    fields: tuple[str, ...] = ("bits", "group_size", "salient", "live")
    parameters: tuple[Parameter, ...] = ()
    bits: int | None = None
    blocks_only: bool = False
    is_trainable: bool = True
    recipe: Any = None
    sharing: Sharing | None = None

    def check(self, request: CodecRequest) -> None:
        """Nothing to refuse: `Spec` checks itself."""

    def encode(
        self, delta: Tensor, moment: Tensor | None, request: CodecRequest
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        spec = self.adapt(request.spec)
        parts = encode(delta, spec, name=self.name, second_moment=moment if self.uses_inputs else None).tensors()
        index = parts.get("salient_index")
        meta = {"bits": spec.bits, "group_size": spec.group_size or 0, "salient": 0 if index is None else len(index)}
        return parts, meta | {"live": len(parts["weight_packed"])}

    def decode(self, parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
        whole = with_all_rows(parts, rows)
        return packed_from(whole, width, bits=meta["bits"], group_size=meta["group_size"] or None).dequantize()

    def shapes(self, rows: int, width: int, meta: Meta) -> Shapes:
        spec = Spec(meta["bits"], meta["group_size"] or None, meta["salient"])
        found = stored_shapes(meta["live"], width, spec, 0, torch.float32)
        return found if meta["live"] == rows else found | {"row_index": ((meta["live"],), torch.int32)}

    def trainable(
        self, base: Tensor, delta: CodedDelta, recipe: Any, device: torch.device, dtype: torch.dtype
    ) -> Trainable:
        raise TypeError(f"{self.name}: packed deltas are trained as such (`compression.distill.student`)")


ME_SWITCH = register(PackedCodec("me-switch"))

"""Codecs by name. A codec turns the delta of one matrix into named tensors, and back.

`me-switch` is registered by this package. Another package brings a codec by a module that calls `register`, and names
the module in its entry point group `meswitch.codecs`: it is imported when a name is asked for that is not registered
yet. So an artifact of another method opens where the package that brings the method is installed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from meswitch.codec.delta import Spec

if TYPE_CHECKING:
    from meswitch.codec.coded import CodedDelta, Trainable

ENTRY_POINTS = "meswitch.codecs"
Meta = Mapping[str, int]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


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
class Request:
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
            `Request.share`.
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
        """The `Recipe` it was published with (`compression.distill.recipe`); None trains by the default one."""

    @property
    def sharing(self) -> Sharing | None:
        """For methods that treat a matrix by how it compares with the others."""

    def check(self, request: Request) -> None:
        """Refuse a request that the method cannot follow, whatever the matrix.

        Raises:
            ValueError: naming what is wrong.
        """

    def encode(
        self, delta: Tensor, moment: Tensor | None, request: Request
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
            "(other papers' methods: pip install 'meswitch[lab]')"
        )
    return _CODECS[name]

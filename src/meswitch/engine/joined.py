"""Linear layers that are given the same rows, such as a block's queries, keys and values: one launch computes them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from meswitch.engine.coded import CodedLinear
from meswitch.engine.context import TRITON, Owners
from meswitch.ops import SlotLinear, fused_linears, joins
from meswitch.ops.codes import Codes
from meswitch.ops.layout import Variant
from meswitch.ops.routing import MAX_TOKENS
from meswitch.ops.triton.ahead import Compilation, fused_jobs

if TYPE_CHECKING:
    from meswitch.engine.layers import SwitchableLinear

_MOST = 6  # layers of a launch


class Joined:
    """Layers that are called one after another with the same input, in steps that are computed from tables.

    The first of them computes all. Each of the others takes its part, once, if it is called with the very tensor that
    the first was called with; else it computes by itself. A model that changes that tensor in between is found out when
    an engine opens, by the proof of its blocks.

    Args:
        members: in the order in which they are called.
    """

    def __init__(self, members: Sequence["SwitchableLinear"]) -> None:
        self.members = tuple(members)
        self._x: Tensor | None = None
        self._parts: dict[SwitchableLinear, Tensor] = {}

    @classmethod
    def join(cls, layers: Sequence["SwitchableLinear"]) -> None:
        """Let layers of one input be computed together, few enough for a launch."""
        for first in range(0, len(layers), _MOST):
            group = cls(layers[first : first + _MOST])
            for layer in group.members if len(group.members) > 1 else ():
                layer.joined = group

    def part(self, member: "SwitchableLinear", x: Tensor, owners: Owners) -> Tensor | None:
        """A layer's product with its experts' deltas, [rows, out_features]; None if it is to be computed alone.

        Args:
            x: what the layer was called with: [..., in_features].
        """
        if member is self.members[0]:
            self._x, self._parts = x, self._computed(x.reshape(-1, x.shape[-1]), owners)
        if x is not self._x:
            return None
        found = self._parts.pop(member, None)
        if not self._parts:
            self._x = None
        return found

    def linears(self) -> tuple[list[Tensor | Codes], list[SlotLinear], list[Tensor | None]] | None:
        """Weights, deltas and biases of the layers as the kernel takes them; None if one launch cannot compute them."""
        weights: list[Tensor | Codes] = []
        layers: list[SlotLinear] = []
        biases: list[Tensor | None] = []
        for member in self.members:
            base, layer = member.base, member.switch.kernel_layer(member.weight_name)
            if layer is None:
                return None
            layers.append(layer)
            weights.append(base.held if isinstance(base, CodedLinear) else base.weight)
            biases.append(member.shared_bias)
        return (weights, layers, biases) if joins(weights, layers, biases) else None

    def jobs(self, sizes: Iterable[tuple[int, int, int]]) -> Iterator[Compilation]:
        """What is launched in steps of these sizes, as of `fused_jobs`, if experts have biases of their own or not."""
        if (found := self.linears()) is None:
            return
        (first, *_), layers, biases = found
        base = self.members[0].base
        codes, dtype = (first.codes.dtype, base.workspace.dtype) if isinstance(first, Codes) else (None, first.dtype)
        rows, variant = tuple(layer.rows for layer in layers), Variant.over(layer.variant for layer in layers)
        for bias in {False, biases[0] is not None}:
            yield from fused_jobs(rows, layers[0].in_features, variant, dtype, bias, sizes, codes)

    def _computed(self, inputs: Tensor, owners: Owners) -> "dict[SwitchableLinear, Tensor]":
        """inputs: [rows, in_features]."""
        if not owners.any or len(inputs) > MAX_TOKENS or (found := self.linears()) is None:
            return {}
        weights, layers, biases = found
        products = fused_linears(inputs, weights, layers, owners.routing, biases, TRITON)
        return dict(zip(self.members, products, strict=True))

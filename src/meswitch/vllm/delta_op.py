"""What deltas add in vLLM: `y += x D^T` and `x W^T + x D^T` as operators, norms as modules.

A traced model calls the operators with tensors only. The step's routing is not among their arguments: how many experts
a step has must not be traced. So an operator's body looks it up, as vLLM's attention does with its metadata; a captured
graph keeps the kernel with the static buffers. vLLM itself is not needed here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from meswitch.ops import expert_linear, expert_prefill, fused_linear
from meswitch.ops.layout import SlotLinear, Variant
from meswitch.ops.routing import MAX_TOKENS, Step, is_idle
from meswitch.vllm.support import formula_of

_current: list[Step] = []  # of the one model of this process


def read_step(step: Step) -> None:
    """Make `step` the one that the operators read."""
    _current[:] = [step]


def _add_delta(
    y: Tensor, x: Tensor, arena: Tensor, table: Tensor, arrived: Tensor, side: int, variant: list[int]
) -> None:
    routing = _current[0].sides[side].routing(len(x))
    if routing is None:
        return
    layer = SlotLinear(arena, table, arrived, y.shape[1], x.shape[1], _variant(variant))
    expert_linear(y, x, layer, routing)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arena: Tensor, table: Tensor, arrived: Tensor, variant: list[int]
) -> Tensor:
    side = _current[0].tokens
    layer = SlotLinear(arena, table, arrived, weight.shape[0], weight.shape[1], _variant(variant))
    if side.active and len(x) > MAX_TOKENS:
        return expert_prefill(x, weight, layer, side.prefill(len(x)), bias)
    routing = side.routing(len(x))
    if routing is None:
        return torch.nn.functional.linear(x, weight, bias)
    return fused_linear(x, weight, layer, routing, bias)


def _variant(numbers: list[int]) -> Variant:
    """As the operators take it: a list, for it is the same in every step."""
    two, one, group, salient = numbers
    return Variant(two, bool(one), group, salient)


# Not `torch.library.custom_op`: its checks cost more than a small layer on a CPU.
_library = torch.library.Library("meswitch_vllm", "DEF")
_library.define(
    "add_delta(Tensor(a!) y, Tensor x, Tensor arena, Tensor table, Tensor(b!) arrived, int side, int[] variant) -> ()"
)
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor arena, Tensor table, Tensor(a!) arrived, int[] variant) "
    "-> Tensor"
)
_library.impl("add_delta", _add_delta, "CompositeExplicitAutograd")
_library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("meswitch_vllm::add_delta", lambda *_: None, lib=_library)
torch.library.register_fake(
    "meswitch_vllm::linear", lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]), lib=_library
)


def add_delta(y: Tensor, x: Tensor, layer: SlotLinear, side: int) -> None:
    """Add each row's delta to it, in place.

    Args:
        y: [rows, layer.rows], rows are contiguous. x: [rows, layer.in_features] of y's dtype. side: `routing.TOKENS` or
            `routing.HEAD`.
    """
    torch.ops.meswitch_vllm.add_delta(y, x, layer.arena, layer.table, layer.arrived, side, layer.variant)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, layer: SlotLinear) -> Tensor:
    """The base's product with each row's delta, in one kernel where the step is small.

    Args:
        x: [rows, layer.in_features]. weight: [layer.rows, layer.in_features] of x's dtype. bias: [layer.rows].

    Returns:
        [rows, layer.rows].
    """
    found: Tensor = torch.ops.meswitch_vllm.linear(
        x, weight, bias, layer.arena, layer.table, layer.arrived, layer.variant
    )
    return found


class DeltaNorm(nn.Module):
    """A norm that gives each token its own expert's weights.

    Args:
        base: vLLM's norm.
        vectors: [slots + 1, width] float32, as `norm_vector` lays them out; the last is the base's.
        step: the step that runs.
        axis: of the input, along which tokens lie.
    """

    def __init__(self, base: Any, vectors: Tensor, step: Step, axis: int = 0) -> None:
        super().__init__()
        formula = formula_of(base)
        assert formula is not None
        self.base_layer, self.vectors, self.step, self.axis = base, vectors, step, axis
        self.formula = formula
        self.shape = tuple(base.weight.shape)
        self.eps = base.variance_epsilon if hasattr(base, "variance_epsilon") else base.eps
        self.variance_size = getattr(base, "variance_size_override", None)
        self.is_biased = getattr(base, "bias", None) is not None

    def __getattr__(self, name: str) -> Any:  # some models look at a norm's weight or size
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """The same shape as `x`; and the residual, where the base's norm returns it."""
        formula, dtype = self.formula, x.dtype
        if is_idle(self.step, x):
            return self.base_layer(x) if residual is None and not formula.pair else self.base_layer(x, residual)
        wide = x.float()
        if residual is not None and formula.adds:
            wide = wide + residual.float()
            residual = wide.to(dtype)
        if formula.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        measured = wide if self.variance_size is None else wide[..., : self.variance_size]
        normal = wide * torch.rsqrt(measured.pow(2).mean(-1, keepdim=True) + self.eps)
        weight, bias = self._own(x)
        if formula.wide:
            y = normal * (weight + formula.offset)
        else:
            weight = weight.to(self.base_layer.weight.dtype)
            y = normal.to(weight.dtype) * weight
        y = (y if bias is None else y + bias).to(dtype)
        return (y, residual) if formula.pair or residual is not None else y

    def _own(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each token's weight and bias, to be multiplied with `x`."""
        tokens = x.shape[self.axis]
        own = self.vectors[self.step.tokens.token_slots[:tokens]]
        between = x.dim() - self.axis - 1 - len(self.shape)
        shape = (*[1] * self.axis, tokens, *[1] * between, *self.shape)
        if not self.is_biased:
            return own.view(shape), None
        weight, bias = own.chunk(2, dim=1)
        return weight.reshape(shape), bias.reshape(shape)

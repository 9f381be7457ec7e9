"""`y += x D^T` and `x W^T + x D^T` as operators that a traced model calls with tensors only.

The step's routing is not among its arguments: how many experts a step has must not be traced. So the operator's body
looks it up, as vLLM's attention does with its metadata; a captured graph keeps the kernel with the static buffers.
vLLM itself is not needed here.
"""

import torch
from torch import Tensor

from meswitch.ops import expert_linear, expert_prefill, fused_linear
from meswitch.ops.layout import SlotLinear, Variant
from meswitch.ops.routing import MAX_TOKENS
from meswitch.ops.step import Step

_current: list[Step] = []  # of the one model of this process


def read_step(step: Step) -> None:
    """Make `step` the one that the operators read."""
    _current[:] = [step]


def _add_delta(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    arrived: Tensor,
    side: int,
    two: int,
    one: bool,
    group: int,
    salient: int,
) -> None:
    routing = _current[0].sides[side].routing(len(x))
    if routing is None:
        return
    layer = SlotLinear(arena, table, arrived, y.shape[1], x.shape[1], Variant(two, one, group, salient))
    expert_linear(y, x, layer, routing)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arena: Tensor,
    table: Tensor,
    arrived: Tensor,
    two: int,
    one: bool,
    group: int,
    salient: int,
) -> Tensor:
    side = _current[0].tokens
    layer = SlotLinear(arena, table, arrived, weight.shape[0], weight.shape[1], Variant(two, one, group, salient))
    if side.active and len(x) > MAX_TOKENS:
        return expert_prefill(x, weight, layer, side.prefill(len(x)), bias)
    routing = side.routing(len(x))
    if routing is None:
        return torch.nn.functional.linear(x, weight, bias)
    return fused_linear(x, weight, layer, routing, bias)


# Not `torch.library.custom_op`: its checks cost more than a small layer on a CPU.
_library = torch.library.Library("meswitch_vllm", "DEF")
_library.define(
    "add_delta(Tensor(a!) y, Tensor x, Tensor arena, Tensor table, Tensor(b!) arrived, int side, int two, bool one, "
    "int group, int salient) -> ()"
)
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor arena, Tensor table, Tensor(a!) arrived, int two, bool one, "
    "int group, int salient) -> Tensor"
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
        y: [rows, layer.rows], rows are contiguous. x: [rows, layer.in_features] of y's dtype. side: `step.TOKENS` or
            `step.HEAD`.
    """
    torch.ops.meswitch_vllm.add_delta(y, x, layer.arena, layer.table, layer.arrived, side, *layer.variant)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, layer: SlotLinear) -> Tensor:
    """The base's product with each row's delta, in one kernel where the step is small.

    Args:
        x: [rows, layer.in_features]. weight: [layer.rows, layer.in_features] of x's dtype. bias: [layer.rows].

    Returns:
        [rows, layer.rows].
    """
    found: Tensor = torch.ops.meswitch_vllm.linear(
        x, weight, bias, layer.arena, layer.table, layer.arrived, *layer.variant
    )
    return found

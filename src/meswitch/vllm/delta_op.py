"""`y += x D^T` as one operator that a traced model calls with tensors only.

The step's routing is not among its arguments: how many experts a step has must not be traced. So the operator's body
looks it up, as vLLM's attention does with its metadata; a captured graph keeps the kernel with the static buffers.
"""

import torch
from torch import Tensor

from meswitch.ops import expert_linear
from meswitch.ops.slots import SlotLinear, Variant
from meswitch.vllm.step import Step

_current: list[Step] = []  # of the one model of this process


def install(step: Step) -> None:
    """Make `step` the one that the operator reads."""
    _current[:] = [step]


def _add_delta(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    arrived: Tensor,
    side: int,
    two: bool,
    one: bool,
    group: int,
    salient: int,
) -> None:
    routing = _current[0].sides[side].routing(len(x))
    if routing is None:
        return
    layer = SlotLinear(arena, table, arrived, y.shape[1], x.shape[1], Variant(two, one, group, salient))
    expert_linear(y, x, layer.for_places(routing.slots.numel()), routing)


# Not `torch.library.custom_op`: its checks cost more than a small layer on a CPU.
_library = torch.library.Library("meswitch_vllm", "DEF")
_library.define(
    "add_delta(Tensor(a!) y, Tensor x, Tensor arena, Tensor table, Tensor(b!) arrived, int side, bool two, bool one, "
    "int group, int salient) -> ()"
)
_library.impl("add_delta", _add_delta, "CompositeExplicitAutograd")
torch.library.register_fake("meswitch_vllm::add_delta", lambda *_: None, lib=_library)


def add_delta(y: Tensor, x: Tensor, layer: SlotLinear, side: int) -> None:
    """Add each row's delta to it, in place.

    Args:
        y: [rows, layer.rows], rows are contiguous. x: [rows, layer.in_features] of y's dtype. side: `step.TOKENS` or
            `step.HEAD`.
    """
    torch.ops.meswitch_vllm.add_delta(y, x, layer.arena, layer.table, layer.arrived, side, *layer.variant)

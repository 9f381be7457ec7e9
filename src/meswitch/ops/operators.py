"""The operators of `torch.library` behind `ops.linear`, which documents their arguments."""

import torch
from torch import Tensor

from meswitch.ops import reference
from meswitch.ops.slots import read_slot


@torch.library.custom_op("meswitch::expert_linear", mutates_args=("y", "arrived"))
def _expert_linear(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    arrived: Tensor,
    slots: Tensor,
    starts: Tensor,
    order: Tensor,
    max_tokens: int,
    two: bool,
    one: bool,
    group: int,
    salient: int,
    backend: str,
) -> None:
    if backend == "triton":
        from meswitch.ops.triton_launch import decode

        decode(y, x, arena, table, arrived, slots, starts, order, max_tokens, two, one, group, salient)
        return
    y.copy_(y.float() + _reference_delta(x, arena, table, slots, starts, order, y.shape[1], group))


@_expert_linear.register_fake
def _(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    arrived: Tensor,
    slots: Tensor,
    starts: Tensor,
    order: Tensor,
    max_tokens: int,
    two: bool,
    one: bool,
    group: int,
    salient: int,
    backend: str,
) -> None:
    return None


@torch.library.custom_op("meswitch::fused_linear", mutates_args=("arrived",))
def _fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arena: Tensor,
    table: Tensor,
    arrived: Tensor,
    slots: Tensor,
    starts: Tensor,
    order: Tensor,
    max_tokens: int,
    two: bool,
    one: bool,
    group: int,
    salient: int,
    backend: str,
) -> Tensor:
    if backend == "triton":
        from meswitch.ops.triton_launch import fused

        y = x.new_empty(len(x), len(weight))
        fused(y, x, weight, bias, arena, table, arrived, slots, starts, order, max_tokens, two, one, group, salient)
        return y
    sums = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return (sums + _reference_delta(x, arena, table, slots, starts, order, len(weight), group)).to(x.dtype)


@_fused_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arena: Tensor,
    table: Tensor,
    arrived: Tensor,
    slots: Tensor,
    starts: Tensor,
    order: Tensor,
    max_tokens: int,
    two: bool,
    one: bool,
    group: int,
    salient: int,
    backend: str,
) -> Tensor:
    return x.new_empty(len(x), len(weight))


def _reference_delta(
    x: Tensor, arena: Tensor, table: Tensor, slots: Tensor, starts: Tensor, order: Tensor, rows: int, group: int
) -> Tensor:
    """[tokens, rows] float32: 0 for the base's tokens."""
    added = torch.zeros(len(x), rows, dtype=torch.float32, device=x.device)
    first = starts.tolist()
    for e, slot in enumerate(slots.tolist()):
        delta = read_slot(arena, table[slot].tolist(), rows, x.shape[1], group) if slot >= 0 else None
        if delta is not None:
            tokens = order[first[e] : first[e + 1]].long()
            added[tokens] = reference.expert_matmul(x[tokens], delta)
    return added

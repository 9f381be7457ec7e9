"""The operators of `torch.library` behind `ops.linear`, which documents their arguments.

An operator takes tensors and numbers only: `flat` spreads a layer and a step's routing out, the operators put them
together again.
"""

from typing import Any

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops import reference
from meswitch.ops.routing import Routing
from meswitch.ops.slots import SlotLinear, Variant, read_slot

KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def chosen_backend(name: str | None, device: torch.device, operator: str) -> str:
    """`triton` or `reference`: the one asked for, or by the device.

    Raises:
        ConfigError: another is asked for.
    """
    name = name or ("triton" if device.type == "cuda" else "reference")
    if name not in ("triton", "reference"):
        raise ConfigError(f"backend: {name!r} has no {operator}; 'triton' and 'reference' have")
    return name


def flat(layer: SlotLinear, routing: Routing) -> tuple[Any, ...]:
    """As the operators take them, from `arena` to `salient`."""
    step = routing.slots, routing.starts, routing.order, routing.max_tokens
    return layer.arena, layer.table, layer.arrived, *step, *layer.variant


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
    layer = SlotLinear(arena, table, arrived, y.shape[1], x.shape[1], Variant(two, one, group, salient))
    routing = Routing(slots, starts, order, max_tokens)
    if backend == "triton":
        from meswitch.ops.triton_launch import decode

        decode(y, x, layer, routing)
        return
    y.copy_(y.float() + _reference_delta(x, layer, routing))


@_expert_linear.register_fake
def _(*_: object) -> None:
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
    layer = SlotLinear(arena, table, arrived, weight.shape[0], weight.shape[1], Variant(two, one, group, salient))
    routing = Routing(slots, starts, order, max_tokens)
    if backend == "triton":
        from meswitch.ops.triton_launch import fused

        y = x.new_empty(len(x), len(weight))
        fused(y, x, weight, bias, layer, routing)
        return y
    sums = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return (sums + _reference_delta(x, layer, routing)).to(x.dtype)


@_fused_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(len(x), len(weight))


def _reference_delta(x: Tensor, layer: SlotLinear, routing: Routing) -> Tensor:
    """[tokens, rows] float32: 0 for the base's tokens."""
    added = torch.zeros(len(x), layer.rows, dtype=torch.float32, device=x.device)
    first = routing.starts.tolist()
    for e, slot in enumerate(routing.slots.tolist()):
        if slot < 0:
            continue
        row = layer.table[slot].tolist()
        delta = read_slot(layer.arena, row, layer.rows, layer.in_features, layer.variant.group)
        if delta is not None:
            tokens = routing.order[first[e] : first[e + 1]].long()
            added[tokens] = reference.expert_matmul(x[tokens], delta)
    return added

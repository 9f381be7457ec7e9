"""`y += x D^T` for the tokens of many experts, as one operator of `torch.library`."""

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops import reference
from meswitch.ops.routing import Routing
from meswitch.ops.slots import SlotLinear, read_slot

MAX_TOKENS = 64  # of one expert in the decode kernel


def expert_linear(y: Tensor, x: Tensor, layer: SlotLinear, routing: Routing, backend: str | None = None) -> Tensor:
    """Add each expert's delta to its tokens' outputs, in place.

    Args:
        y: [tokens, rows] bf16 or fp16, the base's output; rows are contiguous. x: [tokens, in_features] of y's dtype.
        backend: `triton` or `reference`; by default triton on a GPU.

    Returns:
        y.

    Raises:
        ConfigError: the backend cannot serve this; the message names one that can.
    """
    backend = backend or ("triton" if x.device.type == "cuda" else "reference")
    if backend not in ("triton", "reference"):
        raise ConfigError(f"backend: {backend!r} has no expert_linear; 'triton' and 'reference' have")
    if backend == "triton":
        check(y, x, layer, routing)
    v = layer.variant
    torch.ops.meswitch.expert_linear(
        y,
        x,
        layer.arena,
        layer.table,
        layer.arrived,
        routing.slots,
        routing.starts,
        routing.order,
        routing.max_tokens,
        v.two,
        v.one,
        v.group,
        v.salient,
        backend,
    )
    return y


def check(y: Tensor, x: Tensor, layer: SlotLinear, routing: Routing) -> None:
    """Refuse what the Triton kernel does not compute.

    Raises:
        ConfigError: names the backend that serves it.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or y.dtype != x.dtype:
        raise ConfigError(
            f"dtype: x is {x.dtype}, y {y.dtype}: the triton backend takes bfloat16 or float16 for both; "
            "the backend 'reference' serves any"
        )
    if routing.max_tokens > MAX_TOKENS:
        raise ConfigError(
            f"{routing.max_tokens} tokens of one expert: the triton decode kernel takes up to {MAX_TOKENS}; "
            "the backend 'reference' serves any number"
        )
    if x.shape != (len(y), layer.in_features) or y.shape[1] != layer.rows or x.stride(1) != 1 or y.stride(1) != 1:
        raise ConfigError(
            f"shapes: x {tuple(x.shape)}, y {tuple(y.shape)} for a layer of {layer.rows} x {layer.in_features}"
        )


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
    first = starts.tolist()
    for e, slot in enumerate(slots.tolist()):
        delta = read_slot(arena, table[slot].tolist(), y.shape[1], x.shape[1], group) if slot >= 0 else None
        if delta is not None:
            tokens = order[first[e] : first[e + 1]].long()
            y[tokens] = (y[tokens].float() + reference.expert_matmul(x[tokens], delta)).to(y.dtype)


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

"""The operators of `torch.library` behind `ops.linear`, which documents their arguments.

An operator takes tensors and numbers only: `flat` spreads a layer and a step's routing out, the operators put them
together again.
"""

from typing import Any

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops import cpu, reference
from meswitch.ops.routing import Routing
from meswitch.ops.slots import SlotLinear, Variant, read_slot

KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def chosen_backend(name: str | None, device: torch.device, operator: str) -> str:
    """`triton`, `cpu` or `reference`: the one asked for, or by the device.

    Raises:
        ConfigError: another is asked for, or `cpu` elsewhere.
    """
    default = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
    name = name or default
    if name not in ("triton", "cpu", "reference"):
        raise ConfigError(f"backend: {name!r} has no {operator}; 'triton', 'cpu' and 'reference' have")
    if name == "cpu" and device.type != "cpu":
        raise ConfigError(f"backend: 'cpu' computes on a CPU, the tensors are on {device}; use {default!r}")
    return name


def uses_kernels(name: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an engine computes deltas by the GPU kernels: asked for by name, or chosen by device and dtype.

    Raises:
        ConfigError: asked for, and they do not take this dtype; the message names a backend that does.
    """
    if name is None:
        return device.type == "cuda" and dtype in KERNEL_DTYPES
    if name == "triton" and dtype not in KERNEL_DTYPES:
        raise ConfigError(
            f"backend: triton: takes bfloat16 and float16, the model is {str(dtype).removeprefix('torch.')}; give a "
            "dtype, or use the backend 'reference'"
        )
    return name == "triton"


def flat(layer: SlotLinear, routing: Routing) -> tuple[Any, ...]:
    """As the operators take them, from `arena` to `salient`."""
    step = routing.slots, routing.starts, routing.order, routing.piece, routing.likely
    return layer.arena, layer.table, layer.arrived, *step, *layer.variant


def _expert_linear(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    arrived: Tensor,
    slots: Tensor,
    starts: Tensor,
    order: Tensor,
    piece: int,
    likely: int,
    two: int,
    one: bool,
    group: int,
    salient: int,
    backend: str,
) -> None:
    layer = SlotLinear(arena, table, arrived, y.shape[1], x.shape[1], Variant(two, one, group, salient))
    routing = Routing(slots, starts, order, piece, likely)
    if backend == "triton":
        from meswitch.ops.triton.launch import decode

        decode(y, x, layer, routing)
        return
    y.copy_(y.float() + _delta(x, layer, routing, backend))


_expert_linear_op = torch.library.custom_op("meswitch::expert_linear", _expert_linear, mutates_args=("y", "arrived"))


@_expert_linear_op.register_fake
def _(*_: object) -> None:
    return None


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
    piece: int,
    likely: int,
    two: int,
    one: bool,
    group: int,
    salient: int,
    backend: str,
) -> Tensor:
    layer = SlotLinear(arena, table, arrived, weight.shape[0], weight.shape[1], Variant(two, one, group, salient))
    routing = Routing(slots, starts, order, piece, likely)
    if backend == "triton":
        from meswitch.ops.triton.launch import fused

        y = x.new_empty(len(x), len(weight))
        fused(y, x, weight, bias, layer, routing)
        return y
    sums = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return (sums + _delta(x, layer, routing, backend)).to(x.dtype)


_fused_linear_op = torch.library.custom_op("meswitch::fused_linear", _fused_linear, mutates_args=("arrived",))


@_fused_linear_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])  # len() would make a traced size a constant


def expert_linear(*arguments: Any) -> None:
    """The operator where somebody traces, for whom it is one; else its function, in a tenth of the time."""
    (torch.ops.meswitch.expert_linear if torch.compiler.is_compiling() else _expert_linear)(*arguments)


def fused_linear(*arguments: Any) -> Tensor:
    """As `expert_linear`."""
    found: Tensor = (torch.ops.meswitch.fused_linear if torch.compiler.is_compiling() else _fused_linear)(*arguments)
    return found


def _delta(x: Tensor, layer: SlotLinear, routing: Routing, backend: str) -> Tensor:
    """[tokens, rows] float32, expert by expert: 0 for the base's tokens."""
    added = torch.zeros(len(x), layer.rows, dtype=torch.float32, device=x.device)
    first, owned = routing.starts.tolist(), dict[int, list[Tensor]]()
    for e, slot in enumerate(routing.slots.tolist()):
        if slot >= 0 and first[e] < first[e + 1]:
            owned.setdefault(slot, []).append(routing.order[first[e] : first[e + 1]].long())
    for slot, segments in owned.items():  # an expert's matrix is restored once, however many segments it has
        where = layer.arena, layer.table[slot].tolist(), layer.rows, layer.in_features, layer.variant.group
        tokens = torch.cat(segments)
        if backend == "cpu":
            matrix = cpu.slot_matrix(*where)
            if matrix is not None:
                added[tokens] = x[tokens].float() @ matrix.T
        elif (delta := read_slot(*where)) is not None:
            added[tokens] = reference.expert_matmul(x[tokens], delta)
    return added

"""Which of the GPU kernels computes a layer of a step, by the step's size alone: all of it is known on the host."""

from typing import Any

from torch import Tensor, nn

from meswitch.engine.context import Owners, TableOwners
from meswitch.ops import SlotLinear, expert_prefill, fused_linear, static_prefill
from meswitch.ops.routing import MAX_TOKENS

TRITON = "triton"


def linear(x: Tensor, base: Any, bias: Tensor | None, layer: SlotLinear | None, owners: Owners) -> Tensor:
    """A linear layer, with packed deltas where there are some: [rows, in_features] -> [rows, out_features].

    Args:
        base: holds the base's weight.
        layer: None if no expert changes it.
    """
    if layer is None or not owners.any:
        return nn.functional.linear(x, base.weight, bias)
    return product(x, base.weight, bias, layer, owners)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, layer: SlotLinear, owners: Owners) -> Tensor:
    """`x W^T + x D^T + bias`, each row with its owner's D: [rows, in_features] -> [rows, out_features].

    Up to 64 rows base and deltas are one launch, which reads each weight once. With more, cuBLAS computes the base, and
    experts of many rows get weights of their own (`ops.prefill`).
    """
    if len(x) <= MAX_TOKENS:
        return fused_linear(x, weight, layer, owners.routing, bias, backend=TRITON)
    if isinstance(owners, TableOwners):
        return static_prefill(x, weight, layer, owners.static, bias, backend=TRITON)
    return expert_prefill(x, weight, layer, owners.prefill, bias, backend=TRITON)

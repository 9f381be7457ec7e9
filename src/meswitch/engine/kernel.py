"""Which of the GPU kernels computes a layer of a step, by the step's size alone: all of it is known on the host."""

from torch import Tensor

from meswitch.engine.context import Owners
from meswitch.ops import SlotLinear, expert_prefill, fused_linear
from meswitch.ops.routing import MAX_TOKENS

TRITON = "triton"


def product(x: Tensor, weight: Tensor, bias: Tensor | None, layer: SlotLinear, owners: Owners) -> Tensor:
    """`x W^T + x D^T + bias`, each row with its owner's D: [rows, in_features] -> [rows, out_features].

    Up to 64 rows base and deltas are one launch, which reads each weight once. With more, cuBLAS computes the base, and
    experts of many rows get merged weights (`ops.prefill`).
    """
    if len(x) <= MAX_TOKENS:
        return fused_linear(x, weight, layer, owners.routing, bias, backend=TRITON)
    return expert_prefill(x, weight, layer, owners.prefill, bias, backend=TRITON)

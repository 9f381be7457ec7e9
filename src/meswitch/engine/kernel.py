"""Which of the GPU kernels computes a layer of a step, by the step's size alone: all of it is known on the host."""

import torch
from torch import Tensor

from meswitch.engine.context import Owners
from meswitch.errors import ConfigError
from meswitch.ops import SlotLinear, expert_prefill, fused_linear
from meswitch.ops.linear import MAX_TOKENS
from meswitch.ops.operators import KERNEL_DTYPES

TRITON = "triton"


def uses_kernels(name: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an engine computes deltas by the GPU kernels: asked for by name, or chosen by device and dtype.

    Raises:
        ConfigError: asked for, and they do not take this dtype; the message names a backend that does.
    """
    if name is None:
        return device.type == "cuda" and dtype in KERNEL_DTYPES
    if name == TRITON and dtype not in KERNEL_DTYPES:
        raise ConfigError(
            f"backend: {TRITON}: takes bfloat16 and float16, the model is {str(dtype).removeprefix('torch.')}; give a "
            "dtype, or use the backend 'reference'"
        )
    return name == TRITON


def product(x: Tensor, weight: Tensor, bias: Tensor | None, layer: SlotLinear, owners: Owners) -> Tensor:
    """`x W^T + x D^T + bias`, each row with its owner's D: [rows, in_features] -> [rows, out_features].

    Up to 64 rows base and deltas are one launch, which reads each weight once. With more, cuBLAS computes the base, and
    experts of many rows get merged weights (`ops.prefill`).
    """
    if len(x) <= MAX_TOKENS:
        return fused_linear(x, weight, layer, owners.routing, bias, backend=TRITON)
    return expert_prefill(x, weight, layer, owners.prefill, bias, backend=TRITON)

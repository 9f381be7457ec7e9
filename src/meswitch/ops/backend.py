"""What computes an expert's part of a layer: which backend an engine takes, and which one an operator."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from meswitch.codec import Delta
from meswitch.errors import ConfigError
from meswitch.ops.cpu import Cpu
from meswitch.ops.reference import Reference

KERNEL_DTYPES = (torch.bfloat16, torch.float16)


class Backend(Protocol):
    """What computes deltas expert by expert; see `Reference` for shapes."""

    def expert_matmul(self, x: Tensor, delta: Delta) -> Tensor: ...

    def expert_rows(self, ids: Tensor, delta: Delta) -> Tensor: ...

    def slot_matmul(
        self, x: Tensor, arena: Tensor, row: Sequence[int], rows: int, in_features: int, group: int
    ) -> Tensor | None: ...


BACKENDS: dict[str, Backend] = {"reference": Reference(), "cpu": Cpu()}


def backend(device_type: str, name: str | None = None) -> Backend:
    """The backend for a device, or the one asked for.

    Raises:
        ConfigError: no backend of that name.
    """
    if name is not None:
        if name not in BACKENDS:
            raise ConfigError(f"backend: {name!r} is none of triton, {', '.join(BACKENDS)}")
        return BACKENDS[name]
    return BACKENDS["cpu"] if device_type == "cpu" else BACKENDS["reference"]


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

"""What an expert adds to the base's output, for the tokens of that expert; one op, several backends."""

from typing import Protocol

from torch import Tensor

from meswitch.codec import Delta
from meswitch.errors import ConfigError
from meswitch.ops import cpu, reference
from meswitch.ops.linear import expert_linear, fused_linear
from meswitch.ops.operators import uses_kernels
from meswitch.ops.prefill import expert_prefill, static_prefill
from meswitch.ops.prefill_routing import PrefillRouting
from meswitch.ops.routing import Routing
from meswitch.ops.rows import embedding_rows, head_logits, rms_norm
from meswitch.ops.slots import SlotLinear


class Backend(Protocol):
    """The functions that a backend module has; see `ops.reference` for their shapes."""

    def expert_matmul(self, x: Tensor, delta: Delta) -> Tensor: ...

    def expert_rows(self, ids: Tensor, delta: Delta) -> Tensor: ...


BACKENDS: dict[str, Backend] = {"reference": reference, "cpu": cpu}


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


__all__ = [
    "BACKENDS",
    "Backend",
    "PrefillRouting",
    "Routing",
    "SlotLinear",
    "backend",
    "embedding_rows",
    "expert_linear",
    "expert_prefill",
    "fused_linear",
    "head_logits",
    "rms_norm",
    "static_prefill",
    "uses_kernels",
]

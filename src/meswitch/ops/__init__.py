"""What an expert adds to the base's output, for the tokens of that expert; one op, several backends."""

from meswitch.ops.backend import BACKENDS, Backend, Reference, backend, uses_kernels
from meswitch.ops.layout import SlotLinear
from meswitch.ops.linear import embedding_rows, expert_linear, fused_linear, fused_linears, joins
from meswitch.ops.prefill import expert_prefill, static_prefill
from meswitch.ops.routing import PrefillRouting, Routing

__all__ = [
    "BACKENDS",
    "Backend",
    "PrefillRouting",
    "Reference",
    "Routing",
    "SlotLinear",
    "backend",
    "embedding_rows",
    "expert_linear",
    "expert_prefill",
    "fused_linear",
    "fused_linears",
    "joins",
    "static_prefill",
    "uses_kernels",
]

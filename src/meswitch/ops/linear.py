"""`y += x D^T` for the tokens of many experts, and `y = x W^T + x D^T`."""

from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops import operators
from meswitch.ops.operators import KERNEL_DTYPES, chosen_backend, flat
from meswitch.ops.routing import MAX_TOKENS, PIECE, Routing
from meswitch.ops.slots import SlotLinear


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
    backend = chosen_backend(backend, x.device, "expert_linear")
    if backend == "triton":
        _check(y, x, layer, routing)
    operators.expert_linear(y, x, *flat(layer, routing), backend)
    return y


def fused_linear(
    x: Tensor,
    weight: Tensor,
    layer: SlotLinear,
    routing: Routing,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear of a decode step with its experts' deltas: `x W^T + x D^T + bias`.

    Args:
        x: [tokens, in_features] bf16 or fp16. weight: [rows, in_features] of x's dtype, rows are contiguous.
        bias: [rows]. backend: `triton` (up to 64 tokens) or `reference`; by default triton on a GPU.

    Returns:
        [tokens, rows] of x's dtype.

    Raises:
        ConfigError: the backend cannot serve this; the message names one that can.
    """
    backend = chosen_backend(backend, x.device, "expert_linear")
    if backend == "triton":
        _check_fused(x, weight, layer, routing)
    return operators.fused_linear(x, weight, bias, *flat(layer, routing), backend)


def _check_fused(x: Tensor, weight: Tensor, layer: SlotLinear, routing: Routing) -> None:
    _check_dtypes(x, weight, "weight")
    if len(x) > MAX_TOKENS or routing.piece != PIECE:
        raise ConfigError(
            f"{len(x)} tokens in pieces of {routing.piece}: the triton fused kernel takes up to {MAX_TOKENS} in pieces "
            f"of {PIECE}; a product with the weight, then expert_linear, or the backend 'reference' serve any number"
        )
    if (
        x.shape[1] != layer.in_features
        or weight.shape != (layer.rows, layer.in_features)
        or x.stride(1) != 1
        or weight.stride(1) != 1
        or len(routing.order) != len(x)
    ):
        raise ConfigError(
            f"shapes: x {tuple(x.shape)}, weight {tuple(weight.shape)}, {len(routing.order)} routed tokens "
            f"for a layer of {layer.rows} x {layer.in_features}"
        )


def _check(y: Tensor, x: Tensor, layer: SlotLinear, routing: Routing) -> None:
    """Refuse what the Triton kernel does not compute.

    Raises:
        ConfigError: names the backend that serves it.
    """
    _check_dtypes(x, y, "y")
    if routing.piece > MAX_TOKENS:
        raise ConfigError(
            f"pieces of {routing.piece} tokens: the triton decode kernel takes up to {MAX_TOKENS}; "
            "the backend 'reference' serves any number"
        )
    if x.shape != (len(y), layer.in_features) or y.shape[1] != layer.rows or x.stride(1) != 1 or y.stride(1) != 1:
        raise ConfigError(
            f"shapes: x {tuple(x.shape)}, y {tuple(y.shape)} for a layer of {layer.rows} x {layer.in_features}"
        )


def _check_dtypes(x: Tensor, other: Tensor, name: str) -> None:
    if x.dtype not in KERNEL_DTYPES or other.dtype != x.dtype:
        raise ConfigError(
            f"dtype: x is {x.dtype}, {name} {other.dtype}: the triton backend takes bfloat16 or float16 for both; "
            "the backend 'reference' serves any"
        )

"""A whole linear layer for long segments: each expert's tokens are multiplied once, by `W + D`.

What a delta adds could be a second product, but the first already takes all of the matrix unit's time. On sm_90 a
product of our own restores `W + D` as it reads W (`restored.py`). Elsewhere, and for segments so long that cuBLAS wins,
it is merged block by block: `2 + 2 + bits / 8` bytes a weight for one expert. Short segments share the base's product
and get their deltas from the decode kernel.
"""

import math

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.linear import expert_linear
from meswitch.ops.merge import MOST, merge
from meswitch.ops.prefill_routing import PrefillRouting
from meswitch.ops.restored import launch, restores
from meswitch.ops.routing import Routing
from meswitch.ops.slots import SlotLinear

SCRATCH = 512 << 20  # bytes of merged weights at a time
_WAVE = 4096  # rows: with 1,024 tokens they are 128 tiles of 128 x 256, one for nearly every multiprocessor
_LEAST_ROWS = 256


def expert_prefill(
    x: Tensor,
    weight: Tensor,
    layer: SlotLinear,
    routing: PrefillRouting,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
    scratch: int = SCRATCH,
    restore: bool = True,
) -> Tensor:
    """The base's layer plus each expert's delta, for a step of long segments.

    Args:
        x: [tokens, in_features] bf16 or fp16. weight: [rows, in_features] of x's dtype, the base's. bias: [rows], the
            base's, for all tokens. backend: `triton` or `reference`; by default triton on a GPU. scratch: bytes that
            merged weights may take at a time. restore: False does as where no product restores weights.

    Returns:
        [tokens, rows] of x's dtype.

    Raises:
        ConfigError: the backend cannot serve this; the message names one that can.
    """
    if x.shape[1:] != weight.shape[1:] or weight.shape != (layer.rows, layer.in_features) or x.dtype != weight.dtype:
        raise ConfigError(
            f"shapes: x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype} for a layer of "
            f"{layer.rows} x {layer.in_features}"
        )
    restored = restore and backend in (None, "triton") and restores(weight, layer.variant)
    if not restored:
        routing = routing.merging
    tokens = x if routing.order is None else x.index_select(0, routing.order)
    y = x.new_empty(len(x), layer.rows)
    for first, last in routing.plain:
        _product(tokens[first:last], weight, bias, y[first:last])
    if routing.short is not None:
        expert_linear(y, tokens, layer, routing.short, backend)
    if restored and len(routing.tiles) > 1:
        launch(y, tokens, weight, bias, layer, routing.tiles)
    count = routing.long if restored else len(routing.own)
    merged, merged_slots = routing.own[:count], routing.own_slots[:count]
    for e in range(0, count, MOST):
        spans, slots = merged[e : e + MOST], merged_slots[e : e + MOST]
        step = block_rows(layer.rows, layer.in_features, len(spans), scratch)
        room = weight.new_empty(len(spans) * step * layer.in_features)  # every block's: it may still be in the cache
        for start in range(0, layer.rows, step):
            end = min(start + step, layer.rows)
            block = room[: len(spans) * (end - start) * layer.in_features].view(len(spans), -1, layer.in_features)
            merge(weight, layer, slots, start, end, block, backend)
            own_bias = None if bias is None else bias[start:end]
            for (first, last), own in zip(spans, block, strict=True):
                _product(tokens[first:last], own, own_bias, y[first:last, start:end])
    return y if routing.order is None else torch.empty_like(y).index_copy_(0, routing.order, y)


def static_prefill(
    x: Tensor,
    weight: Tensor,
    layer: SlotLinear,
    routing: tuple[Routing, Routing, Tensor | None],
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The base's layer plus each expert's delta, for a step of many rows in buffers that a graph reads again.

    Args:
        x: [rows, in_features] bf16 or fp16. weight: [out_features, in_features] of x's dtype, the base's. routing: as
            `StaticRouting.part` gives it for so many rows. bias: [out_features], the base's, for all rows. backend: as
            of `expert_prefill`.

    Returns:
        [rows, out_features] of x's dtype.

    Raises:
        ConfigError: the backend cannot serve this; the message names one that can.
    """
    every, short, tiles = routing
    if tiles is None or backend not in (None, "triton") or not restores(weight, layer.variant):
        return expert_linear(torch.nn.functional.linear(x, weight, bias), x, layer, every, backend)
    y = x.new_empty(len(x), layer.rows)
    launch(y, x, weight, bias, layer, tiles)
    return expert_linear(y, x, layer, short, backend)


def block_rows(rows: int, in_features: int, experts: int, scratch: int) -> int:
    """How many rows to merge at a time: few blocks of one size, of whole waves of tiles at most."""
    most = scratch // (experts * in_features * 2)
    if most >= rows:
        return rows
    if most >= _WAVE:
        blocks = math.ceil(rows / (most // _WAVE * _WAVE))
        return math.ceil(rows / blocks / _LEAST_ROWS) * _LEAST_ROWS
    return max(_LEAST_ROWS, 1 << max(most, 1).bit_length() - 1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`out = x weight^T + bias`, in place; out may be some columns of a matrix."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)

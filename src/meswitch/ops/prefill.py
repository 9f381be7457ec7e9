"""A whole linear layer for long segments: each expert's tokens are multiplied once, by `W + D`.

What a delta adds could be a second product, but the first already takes all of the matrix unit's time. On sm_90 a
product of our own restores `W + D` as it reads W (`triton.product`). Elsewhere, and for segments so long that cuBLAS
wins, it is merged block by block: `2 + 2 + bits / 8` bytes a weight for one expert. Short segments share the base's
product and get their deltas from the decode kernel.
"""

import math

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.backend import KERNEL_DTYPES, chosen_backend
from meswitch.ops.layout import SlotLinear, Variant, read_slot
from meswitch.ops.linear import expert_linear
from meswitch.ops.routing import PrefillRouting, Routing
from meswitch.ops.triton import on_hopper

TILE_ROWS = 128  # of the product that restores weights
CHANNELS, BLOCK = 64, 256  # of a step of its tile; of a block of words
_HALF_BLOCK = 128  # channels: the smallest group of scales
MERGED = 4  # experts of one launch that merges: their part of a tile is read ahead, one at a time
_ALIGNED = 32  # rows: no tile may lie on both sides of a border of `layout.SALIENT_ROWS`
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
        x: [tokens, in_features] bf16 or fp16.
        weight: [rows, in_features] of x's dtype, the base's.
        layer: the deltas of all slots.
        routing: whose the tokens are.
        bias: [rows], the base's, for all tokens.
        backend: `triton` or `reference`; by default triton on a GPU.
        scratch: bytes that merged weights may take at a time.
        restore: False does as where no product restores weights.

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
        _restored_product(y, tokens, weight, bias, layer, routing.tiles)
    count = routing.long if restored else len(routing.own)
    merged, merged_slots = routing.own[:count], routing.own_slots[:count]
    for e in range(0, count, MERGED):
        spans, slots = merged[e : e + MERGED], merged_slots[e : e + MERGED]
        step = block_rows(layer.rows, layer.in_features, len(spans), scratch)
        room = weight.new_empty(len(spans) * step * layer.in_features)  # every block's: it may still be in the cache
        for start in range(0, layer.rows, step):
            end = min(start + step, layer.rows)
            block = room[: len(spans) * (end - start) * layer.in_features].view(len(spans), -1, layer.in_features)
            merged_rows(weight, layer, slots, start, end, block, backend)
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
        x: [rows, in_features] bf16 or fp16.
        weight: [out_features, in_features] of x's dtype, the base's.
        layer: the deltas of all slots.
        routing: as `StaticRouting.part` gives it for so many rows.
        bias: [out_features], the base's, for all rows.
        backend: as of `expert_prefill`.

    Returns:
        [rows, out_features] of x's dtype.

    Raises:
        ConfigError: the backend cannot serve this; the message names one that can.
    """
    every, short, tiles = routing
    if tiles is None or backend not in (None, "triton") or not restores(weight, layer.variant):
        return expert_linear(torch.nn.functional.linear(x, weight, bias), x, layer, every, backend)
    y = x.new_empty(len(x), layer.rows)
    _restored_product(y, x, weight, bias, layer, tiles)
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


def _restored_product(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, layer: SlotLinear, tiles: Tensor
) -> None:
    from meswitch.ops.triton.product import product  # only now: its language is not part of every Triton

    product(y, x, weight, bias, layer, tiles)


def restores(weight: Tensor, variant: Variant) -> bool:
    """Whether a layer's product can restore its deltas here."""
    rows, width = weight.shape
    return fits(rows, width, variant, weight.dtype) and weight.stride(0) % 8 == 0 and on_hopper(weight.device)


def fits(rows: int, in_features: int, variant: Variant, dtype: torch.dtype) -> bool:
    """Whether the kernel takes a layer: bf16, whole tiles, deltas of 2 bits in groups of 128 channels and more."""
    grouped = variant.group == 0 or variant.group >= _HALF_BLOCK
    two_bits = variant.two == 1 and not variant.one
    return rows % TILE_ROWS == 0 and in_features % BLOCK == 0 and grouped and two_bits and dtype == torch.bfloat16


def merged_rows(
    weight: Tensor,
    layer: SlotLinear,
    slots: Tensor,
    first: int,
    last: int,
    out: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Rows `first` to `last` of the base's weight plus each expert's delta; an absent delta leaves the weight as it is.

    Args:
        weight: [rows, in_features] bf16 or fp16.
        layer: the deltas of all slots.
        slots: [experts] int32, none below 0.
        first: row, a multiple of 32.
        last: the row after the last one.
        out: [experts, last - first, in_features] of weight's dtype, contiguous; written whole.
        backend: `triton` or `reference`; by default triton on a GPU.

    Returns:
        out.

    Raises:
        ConfigError: the backend cannot serve this; the message names one that can.
    """
    backend = chosen_backend(backend, weight.device, "merge")
    if weight.shape != (layer.rows, layer.in_features) or weight.stride(1) != 1:
        raise ConfigError(f"shapes: weight {tuple(weight.shape)} for a layer of {layer.rows} x {layer.in_features}")
    if out.shape != (len(slots), last - first, layer.in_features) or out.dtype != weight.dtype:
        raise ConfigError(
            f"out: {tuple(out.shape)} {out.dtype} for {len(slots)} experts' rows {first} to {last} of {weight.dtype}"
        )
    if first % _ALIGNED:
        raise ConfigError(f"first: {first} is no multiple of {_ALIGNED}")
    if not out.is_contiguous():
        raise ConfigError("out: not contiguous")
    if backend == "triton" and weight.dtype not in KERNEL_DTYPES:
        raise ConfigError(
            f"dtype: weight is {weight.dtype}: the triton backend takes bfloat16 or float16; "
            "the backend 'reference' serves any"
        )
    torch.ops.meswitch.merge(out, weight, layer.arena, layer.table, slots, first, last, *layer.variant, backend)
    return out


@torch.library.custom_op("meswitch::merge", mutates_args=("out",))
def _merge(
    out: Tensor,
    weight: Tensor,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    first: int,
    last: int,
    two: int,
    one: bool,
    group: int,
    salient: int,
    backend: str,
) -> None:
    if backend == "triton":
        from meswitch.ops.triton.merge import merge_rows

        merge_rows(out, weight, arena, table, slots, first, last, Variant(two, one, group, salient))
        return
    for e, slot in enumerate(slots.tolist()):
        delta = read_slot(arena, table[slot].tolist(), weight.shape[0], weight.shape[1], group)
        merged = weight[first:last]
        if delta is not None:
            rows = torch.arange(first, last, device=weight.device)
            merged = (merged.float() + delta.dequantize(rows)).to(weight.dtype)
        out[e] = merged


@_merge.register_fake
def _(*_: object) -> None:
    return None

"""`y += x D^T` for the tokens of many experts, `y = x W^T + x D^T`, and rows of `W + D`, the embeddings of a batch.

The engines call functions; behind these are operators. An operator of `torch.library` takes tensors and numbers only:
`_flat` spreads a layer and a step's routing out, the operators put them together again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.backend import BACKENDS, KERNEL_DTYPES, chosen_backend
from meswitch.ops.codes import Codes
from meswitch.ops.layout import SlotLinear, Variant, read_slot
from meswitch.ops.routing import MAX_TOKENS, PIECE, Routing


def expert_linear(y: Tensor, x: Tensor, layer: SlotLinear, routing: Routing, backend: str | None = None) -> Tensor:
    """Add each expert's delta to its tokens' outputs, in place.

    Args:
        y: [tokens, rows] bf16 or fp16, the base's output; rows are contiguous.
        x: [tokens, in_features] of y's dtype.
        layer: the deltas of all slots.
        routing: whose the tokens are.
        backend: `triton` or `reference`; by default triton on a GPU.

    Returns:
        y.

    Raises:
        ConfigError: the backend cannot serve this; the message names one that can.
    """
    backend = chosen_backend(backend, x.device, "expert_linear")
    if backend == "triton":
        _check(y, x, layer, routing)
    _call_expert_linear(y, x, *_flat(layer, routing), backend)
    return y


def fused_linear(
    x: Tensor,
    weight: Tensor | Codes,
    layer: SlotLinear,
    routing: Routing,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear of a decode step with its experts' deltas: `x W^T + x D^T + bias`.

    Args:
        x: [tokens, in_features] bf16 or fp16.
        weight: [rows, in_features] of x's dtype, rows are contiguous; or codes.
        layer: the deltas of all slots.
        routing: whose the tokens are.
        bias: [rows].
        backend: `triton` (up to 64 tokens) or `reference`; by default triton on a GPU.

    Returns:
        [tokens, rows] of x's dtype.

    Raises:
        ConfigError: the backend cannot serve this; the message names one that can.
    """
    backend = chosen_backend(backend, x.device, "expert_linear")
    if backend == "triton":
        _check_fused(x, weight, layer, routing)
    matrix, scale = (weight.codes, weight.scale) if isinstance(weight, Codes) else (weight, None)
    return _call_fused_linear(x, matrix, scale, bias, *_flat(layer, routing), backend)


def fused_linears(
    x: Tensor,
    weights: Sequence[Tensor | Codes],
    layers: Sequence[SlotLinear],
    routing: Routing,
    biases: Sequence[Tensor | None],
    backend: str | None = None,
) -> list[Tensor]:
    """As `fused_linear`, of several linears that multiply the same x: with `triton` one launch computes all of them.

    Args:
        x: [tokens, in_features] bf16 or fp16.
        weights: as of `fused_linear`, all of them weights of x's dtype or all codes of one dtype.
        layers: the deltas of each; see `joins`.
        routing: whose the tokens are.
        biases: of each, or None for all.
        backend: as of `fused_linear`.

    Returns:
        [tokens, rows] of x's dtype, contiguous, for each.

    Raises:
        ConfigError: the backend cannot serve this; the message says why.
    """
    backend = chosen_backend(backend, x.device, "expert_linear")
    if backend != "triton":
        parts = zip(weights, layers, biases, strict=True)
        return [fused_linear(x, weight, layer, routing, bias, backend) for weight, layer, bias in parts]
    for weight, layer in zip(weights, layers, strict=True):
        _check_fused(x, weight, layer, routing)
    if not joins(weights, layers, biases):
        raise ConfigError(
            f"{len(layers)} linears: deltas in several arenas or of several group sizes, one layer's twice, weights of "
            "several kinds, or some with a bias: compute each with fused_linear"
        )
    from meswitch.ops.triton.fused import fused

    ys = [x.new_empty(len(x), layer.rows) for layer in layers]
    held = [weight for weight in weights if isinstance(weight, Codes)]
    matrices = [weight.codes if isinstance(weight, Codes) else weight for weight in weights]
    fused(ys, x, matrices, biases, layers, routing, scales=[codes.scale for codes in held] or None)
    return ys


def joins(weights: Sequence[Tensor | Codes], layers: Sequence[SlotLinear], biases: Sequence[Tensor | None]) -> bool:
    """Whether one launch can compute these linears: see `fused_linears`."""
    kinds = {weight.codes.dtype if isinstance(weight, Codes) else None for weight in weights}
    places = {(layer.arena.data_ptr(), layer.in_features, layer.variant.group) for layer in layers}
    counters = {layer.arrived.data_ptr() for layer in layers}  # tied weights share theirs, which count one linear's
    return len(kinds) == len(places) == len({bias is None for bias in biases}) == 1 and len(counters) == len(layers)


def embedding_rows(
    ids: Tensor,
    weight: Tensor,
    layer: SlotLinear,
    token_slots: Tensor,
    extra: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each token's embedding by its own expert.

    Args:
        ids: [tokens] int64; those from `rows` on stand for the expert's extra rows, and for zeros where it has none.
        weight: [rows, in_features], the base's.
        layer: the deltas of all slots.
        token_slots: [tokens] int32, -1 for the base.
        extra: [slots, extra_rows, in_features] of weight's dtype, contiguous.
        backend: `triton` or `reference`; by default triton on a GPU.

    Returns:
        [tokens, in_features] of weight's dtype.

    Raises:
        ConfigError: the backend cannot serve this; the message names one that can.
    """
    backend = chosen_backend(backend, weight.device, "embedding_rows")
    if weight.shape != (layer.rows, layer.in_features) or weight.stride(1) != 1 or ids.shape != token_slots.shape:
        raise ConfigError(
            f"shapes: {len(ids)} ids, {len(token_slots)} slots, weight {tuple(weight.shape)} for a layer of "
            f"{layer.rows} x {layer.in_features}"
        )
    if extra is not None and (extra.dtype != weight.dtype or not extra.is_contiguous()):
        raise ConfigError(f"extra: {extra.dtype}, for weights of {weight.dtype}, or not contiguous")
    own_rows = 0 if extra is None else extra.shape[1]
    return torch.ops.meswitch.embedding_rows(
        *(ids, token_slots, weight, weight if extra is None else extra, own_rows, layer.arena, layer.table),
        *(*layer.variant, backend),
    )


def _check_fused(x: Tensor, weight: Tensor | Codes, layer: SlotLinear, routing: Routing) -> None:
    _check_dtypes(x, weight if isinstance(weight, Tensor) else x, "weight")
    if len(x) > MAX_TOKENS or routing.piece != PIECE:
        raise ConfigError(
            f"{len(x)} tokens in pieces of {routing.piece}: the triton fused kernel takes up to {MAX_TOKENS} in pieces "
            f"of {PIECE}; a product with the weight, then expert_linear, or the backend 'reference' serve any number"
        )
    if (
        x.shape[1] != layer.in_features
        or weight.shape != (layer.rows, layer.in_features)
        or x.stride(1) != 1
        or (isinstance(weight, Tensor) and weight.stride(1) != 1)
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


def _flat(layer: SlotLinear, routing: Routing) -> tuple[Any, ...]:
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
        from meswitch.ops.triton.decode import decode

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
    scale: Tensor | None,
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
    layer = SlotLinear(arena, table, arrived, weight.shape[0], x.shape[1], Variant(two, one, group, salient))
    routing = Routing(slots, starts, order, piece, likely)
    if backend == "triton":
        from meswitch.ops.triton.fused import fused

        y = x.new_empty(len(x), len(weight))
        fused([y], x, [weight], [bias], [layer], routing, scales=None if scale is None else [scale])
        return y
    if scale is None:
        sums = x.float() @ weight.float().T
    else:
        held = Codes(weight, scale)
        sums = x.float() @ held.numbers().mul_(held.scales()).T
    if bias is not None:
        sums += bias.float()
    return (sums + _delta(x, layer, routing, backend)).to(x.dtype)


_fused_linear_op = torch.library.custom_op("meswitch::fused_linear", _fused_linear, mutates_args=("arrived",))


@_fused_linear_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])  # len() would make a traced size a constant


@torch.library.custom_op("meswitch::embedding_rows", mutates_args=())
def _embedding_rows(
    ids: Tensor,
    token_slots: Tensor,
    weight: Tensor,
    extra: Tensor,
    extra_rows: int,
    arena: Tensor,
    table: Tensor,
    two: int,
    one: bool,
    group: int,
    salient: int,
    backend: str,
) -> Tensor:
    rows, width = weight.shape
    out = weight.new_empty(len(ids), width)
    if backend == "triton":
        from meswitch.ops.triton.merge import BLOCK, row_constants, rows_kernel

        rows_kernel[(-(-width // BLOCK.value), len(ids))](
            *(ids, token_slots, weight, extra, out, arena.view(torch.int32), table),
            *(weight.stride(0), extra_rows, rows, width),
            EXTRA=extra_rows > 0,
            num_warps=1,
            **row_constants(Variant(two, one, group, salient)),
        )
        return out
    out.zero_()
    out[ids < rows] = weight[ids[ids < rows]]
    for slot in token_slots.unique().tolist():
        delta = read_slot(arena, table[slot].tolist(), rows, width, group) if slot >= 0 else None
        known, beyond = (token_slots == slot) & (ids < rows), (token_slots == slot) & (ids >= rows)
        if delta is not None and bool(known.any()):
            out[known] = (out[known].float() + delta.dequantize(ids[known])).to(out.dtype)
        if extra_rows and slot >= 0:
            out[beyond] = extra[slot, ids[beyond] - rows]
    return out


@_embedding_rows.register_fake
def _(ids: Tensor, token_slots: Tensor, weight: Tensor, *_: object) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])  # len() would make a traced size a constant


def _call_expert_linear(*arguments: Any) -> None:
    """The operator where somebody traces, for whom it is one; else its function, in a tenth of the time."""
    (torch.ops.meswitch.expert_linear if torch.compiler.is_compiling() else _expert_linear)(*arguments)


def _call_fused_linear(*arguments: Any) -> Tensor:
    """As `_call_expert_linear`."""
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
        own = BACKENDS[backend].slot_matmul(x[tokens], *where)
        if own is not None:
            added[tokens] = own
    return added

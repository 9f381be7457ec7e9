"""Embeddings, heads and norms of a batch of many experts; nothing here waits for the device."""

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.linear import expert_linear
from meswitch.ops.merge import constants
from meswitch.ops.operators import chosen_backend
from meswitch.ops.routing import Routing
from meswitch.ops.slots import SlotLinear, Variant, read_slot


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
        ids: [tokens] int64; from `rows` on they are the expert's extra rows, and 0s where it has none. weight: [rows,
            in_features], the base's. token_slots: [tokens] int32, -1 for the base. extra: [slots, extra_rows,
            in_features] of weight's dtype, contiguous. backend: `triton` or `reference`; by default triton on a GPU.

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


def head_logits(
    x: Tensor,
    weight: Tensor,
    layer: SlotLinear,
    routing: Routing,
    token_slots: Tensor,
    sizes: Tensor,
    extra: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each token's logits by its own expert, whose vocabulary may be smaller or larger than the base's.

    Args:
        x: [tokens, in_features]. weight: [rows, in_features], the base's. token_slots: [tokens] int32, -1 for the base.
            sizes: [slots + 1] int32, each slot's vocabulary and at last the base's. extra: [slots, extra_rows,
            in_features], the rows that the experts have after the base's.

    Returns:
        [tokens, rows + extra_rows] of x's dtype, -inf for tokens that the expert lacks.
    """
    tokens, rows = len(x), layer.rows
    more = 0 if extra is None else extra.shape[1]
    logits = x.new_empty(tokens, rows + more)
    torch.mm(x, weight.T, out=logits[:, :rows])
    expert_linear(logits[:, :rows], x, layer, routing, backend)
    if extra is not None:
        of_all = (x @ extra.flatten(0, 1).T).view(tokens, len(extra), more)
        logits[:, rows:] = of_all[torch.arange(tokens, device=x.device), token_slots.long()]
    beyond = torch.arange(rows + more, device=x.device) >= sizes[token_slots.long()][:, None]
    return logits.masked_fill_(beyond, -torch.inf)


def rms_norm(x: Tensor, weights: Tensor, token_slots: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm with each token's own weights.

    Args:
        x: [tokens, ..., features]. weights: [slots + 1, features], the base's last. token_slots: [tokens] int32, -1
            for the base.

    Returns:
        As x; normalised in float32, rounded to x's dtype before the weights, as the models do.
    """
    wide = x.float()
    normal = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    own = weights[token_slots.long()]
    return normal * own.view(len(x), *[1] * (x.dim() - 2), -1)


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
        from meswitch.ops.triton.merge import BLOCK, rows_kernel

        rows_kernel[(-(-width // BLOCK.value), len(ids))](
            *(ids, token_slots, weight, extra, out, arena.view(torch.int32), table),
            *(weight.stride(0), extra_rows, rows, width),
            EXTRA=extra_rows > 0,
            num_warps=1,
            **constants(Variant(two, one, group, salient)),
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

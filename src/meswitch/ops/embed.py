"""Embeddings of a batch of many experts; nothing here waits for the device."""

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.backend import chosen_backend
from meswitch.ops.layout import SlotLinear, Variant, read_slot


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

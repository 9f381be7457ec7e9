"""`W + D` of several experts, for a range of a layer's rows: what a long segment's product reads."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.operators import KERNEL_DTYPES, chosen_backend
from meswitch.ops.slots import SlotLinear, Variant, read_slot

_ALIGNED = 32  # rows: no tile may lie on both sides of a border of `layout.SALIENT_ROWS`
MOST = 4  # experts of one launch: their part of a tile is read ahead, one at a time


@dataclass(frozen=True, slots=True)
class Tile:
    """rows of a tile of 256 channels, the warps that work on it, and the most registers of a thread if it matters."""

    rows: int
    warps: int
    registers: int | None = None


TILES = {1: Tile(16, 8), 2: Tile(16, 8, 80), 3: Tile(16, 8, 80), 4: Tile(16, 8, 80)}  # by the experts of a launch


def merge(
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
        weight: [rows, in_features] bf16 or fp16. slots: [experts] int32, none below 0. first: a multiple
            of 32. out: [experts, last - first,
            in_features] of weight's dtype, contiguous; written whole.
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


def constants(variant: Variant) -> dict[str, Any]:
    """What both kernels of `triton.merge` are compiled for."""
    from meswitch.ops.triton.launch import INTERPRET
    from meswitch.ops.triton.merge import BLOCK

    block, group = BLOCK.value, variant.group
    return {
        "TWO": variant.two > 0,
        "ONE": variant.one,
        "SALIENT": variant.salient,
        "GROUP": group,
        "GROUPS": block // group if 0 < group < block else 1,
        "INTERPRET": INTERPRET,
    }


def merge_constants(
    experts: int, tile: Tile, rows: int, in_features: int, variant: Variant, dtype: torch.dtype
) -> dict[str, Any]:
    """What `merge_kernel` is compiled for besides `constants`."""
    from meswitch.ops.triton.launch import INTERPRET
    from meswitch.ops.triton.merge import BLOCK

    even = in_features % BLOCK.value == 0 and rows % tile.rows == 0
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    fast = dtype == torch.bfloat16 and variant.two > 0 and not variant.one and not INTERPRET
    return {"EXPERTS": experts, "EVEN": even, "FAST": fast, "ROWS": tile.rows, "num_warps": tile.warps, **limit}


def launch(
    out: Tensor,
    weight: Tensor,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    first: int,
    last: int,
    variant: Variant,
    tile: Tile | None = None,
) -> None:
    """The Triton kernel, once for every `MOST` experts; shapes as for `merge`."""
    from meswitch.ops.triton.merge import BLOCK, merge_kernel

    (rows, width), block = weight.shape, BLOCK.value
    for e in range(0, len(slots), MOST):
        experts = min(MOST, len(slots) - e)
        used = tile or TILES[experts]
        merge_kernel[(-(-width // block), -(-(last - first) // used.rows))](
            *(weight, out[e:], arena.view(torch.int32), table, slots[e:], first, last, weight.stride(0), rows, width),
            **merge_constants(experts, used, last - first, width, variant, weight.dtype),
            **constants(variant),
        )


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
        launch(out, weight, arena, table, slots, first, last, Variant(two, one, group, salient))
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

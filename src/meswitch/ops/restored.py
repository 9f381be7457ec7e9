"""`x (W + D)^T` for segments of a prefill step without writing W + D anywhere: where and how `triton.product` runs."""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meswitch.ops.slots import SlotLinear, Variant

ROWS, TOKENS = 128, 256  # of a tile
CHANNELS, BLOCK = 64, 256  # of a step of a tile; of a block of words
_HALF_BLOCK = 128  # channels: the smallest group of scales


def restores(weight: Tensor, variant: Variant) -> bool:
    """Whether a layer's product can restore its deltas here."""
    rows, width = weight.shape
    return fits(rows, width, variant, weight.dtype) and weight.stride(0) % 8 == 0 and on_hopper(weight.device)


def fits(rows: int, in_features: int, variant: Variant, dtype: torch.dtype) -> bool:
    """Whether the kernel takes a layer: bf16, whole tiles, deltas of 2 bits in groups of 128 channels and more."""
    grouped = variant.group == 0 or variant.group >= _HALF_BLOCK
    two_bits = variant.two == 1 and not variant.one
    return rows % ROWS == 0 and in_features % BLOCK == 0 and grouped and two_bits and dtype == torch.bfloat16


@functools.cache
def on_hopper(device: torch.device) -> bool:
    """Whether kernels for `wgmma` run there: a GPU of compute capability 9, and a Triton that has its language."""
    there = device.type == "cuda" and torch.cuda.is_available()
    if not there or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    from meswitch.ops.triton.launch import INTERPRET  # only now: a CPU may have no Triton

    return not INTERPRET and importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None


def token_tiles(segments: Sequence[tuple[int, int, int]], tokens: int) -> list[tuple[int, int, int, int]]:
    """First token of each tile, its segment's first token and end, the slot.

    A step's last tile starts early enough to end with the step: rows that are not there take longer to fill with zeros
    than to read, and what it computes of the tokens before its segment is not written.

    Args:
        segments: first token, end, slot. tokens: of the step.
    """
    last = max(0, tokens - TOKENS)
    return [
        (min(start, last), first, end, slot) for first, end, slot in segments for start in range(first, end, TOKENS)
    ]


def tile_table(segments: Sequence[tuple[int, int, int]], tokens: int) -> Tensor:
    """[1 + tiles, 4] int32 on the host, as the kernel reads it: how many tiles in the first place, then the tiles.

    Args:
        segments: first token, end, slot. tokens: of the step.
    """
    tiles = token_tiles(segments, tokens)
    return torch.tensor([(len(tiles), 0, 0, 0), *tiles], dtype=torch.int32)


def launch(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, layer: SlotLinear, tiles: Tensor) -> None:
    """Write the tokens of the tiles' segments, and no others.

    Args:
        y: [tokens, rows] bf16, rows are contiguous. x: [tokens, in_features]. weight: [rows, in_features].
        bias: [rows]. tiles: [1 + room, 4] int32, as `tile_table` has them, with one tile at least.
    """
    from meswitch.ops.triton.product import product_kernel

    rows, width = weight.shape
    x = _reachable(x)
    product_kernel[(min(_processors(x.device), rows // ROWS * (len(tiles) - 1)),)](
        *descriptors(x, weight),
        *(x, layer.arena.view(torch.int32), layer.table, tiles, y, y if bias is None else bias),
        *(x.stride(0), y.stride(0), rows, width),
        **constants(layer.variant, bias is not None),
    )


def _reachable(x: Tensor) -> Tensor:
    """As the copy engine wants it: rows that begin at multiples of 16 bytes."""
    fits = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def descriptors(x: Tensor, weight: Tensor) -> tuple[Any, Any]:
    """What the copy engine takes for a matrix and a tile of it."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    swizzled = gl.NVMMASharedLayout(swizzle_byte_width=2 * CHANNELS, element_bitwidth=16, rank=2)
    x_tiles = TensorDescriptor.from_tensor(x, [TOKENS, CHANNELS], swizzled)
    return x_tiles, TensorDescriptor.from_tensor(weight, [ROWS, CHANNELS], swizzled)


def constants(variant: Variant, bias: bool) -> dict[str, Any]:
    """What the kernel is compiled for. maxnreg: of 12 warps; those that multiply take more, those that bring fewer."""
    return {"GROUP": variant.group, "SALIENT": variant.salient > 0, "BIAS": bias, "num_warps": 4, "maxnreg": 168}


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

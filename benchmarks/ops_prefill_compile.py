"""The kernels that a prefill benchmark launches, for `ops_timing.compile_all`."""

import torch

from meswitch.ops.merge import TILES, Tile, constants, merge_constants
from meswitch.ops.prefill_routing import PrefillRouting
from meswitch.ops.slots import Variant
from meswitch.ops.triton_launch import choose
from meswitch.ops.triton_launch import constants as decode_constants
from ops_timing import Kernel


def merge_job(dtype: torch.dtype, shape: tuple[int, int], v: Variant, experts: int, tile: Tile | None = None) -> Kernel:
    own = merge_constants(experts, tile or TILES[experts], *shape, v, dtype)
    return Kernel("merge", dtype, *shape, constants(v) | own)


def rows_job(dtype: torch.dtype, shape: tuple[int, int], v: Variant) -> Kernel:
    return Kernel("rows", dtype, *shape, constants(v) | {"EXTRA": False, "num_warps": 1})


def decode_jobs(dtype: torch.dtype, shape: tuple[int, int], v: Variant, routing: PrefillRouting) -> list[Kernel]:
    """For the short segments, if there are any."""
    if routing.short is None:
        return []
    config = choose(*shape, routing.short.slots.numel(), routing.short.piece)
    return [Kernel("decode", dtype, *shape, decode_constants(config, *shape, v), config.split > 1)]

"""The kernels that a prefill benchmark launches, for `compile_ahead`."""

import torch

from meswitch.ops.ahead import Job
from meswitch.ops.merge import TILES, Tile, constants, merge_constants
from meswitch.ops.prefill_routing import PrefillRouting
from meswitch.ops.slots import Variant
from meswitch.ops.triton_launch import choose
from meswitch.ops.triton_launch import constants as decode_constants


def merge_job(dtype: torch.dtype, shape: tuple[int, int], v: Variant, experts: int, tile: Tile | None = None) -> Job:
    own = merge_constants(experts, tile or TILES[experts], *shape, v, dtype)
    return Job("merge", dtype, *shape, constants(v) | own)


def rows_job(dtype: torch.dtype, shape: tuple[int, int], v: Variant) -> Job:
    return Job("rows", dtype, *shape, constants(v) | {"EXTRA": False, "num_warps": 1})


def decode_jobs(dtype: torch.dtype, shape: tuple[int, int], v: Variant, routing: PrefillRouting) -> list[Job]:
    """For the short segments, if there are any."""
    if routing.short is None:
        return []
    config = choose(*shape, routing.short.likely, routing.short.piece)
    return [Job("decode", dtype, *shape, decode_constants(config, *shape, v), config.split > 1)]

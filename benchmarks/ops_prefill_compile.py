"""Compile what a prefill benchmark launches, in parallel, into Triton's cache."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from meswitch.ops.merge import TILES, Tile, constants, merge_constants
from meswitch.ops.prefill_routing import PrefillRouting
from meswitch.ops.slots import Variant
from meswitch.ops.triton_launch import choose
from meswitch.ops.triton_launch import constants as decode_constants

Job = tuple[str, tuple, dict]  # kernel, pointers' dtype and sizes, constants


def merge_job(dtype: torch.dtype, shape: tuple[int, int], v: Variant, experts: int, tile: Tile | None = None) -> Job:
    tile = tile or TILES[experts]
    fixed = constants(shape[1], v.two, v.one, v.group, v.salient)
    return "merge", (dtype, *shape), fixed | merge_constants(experts, tile, *shape)


def rows_job(dtype: torch.dtype, shape: tuple[int, int], v: Variant) -> Job:
    fixed = constants(shape[1], v.two, v.one, v.group, v.salient)
    return "rows", (dtype, *shape), fixed | {"EXTRA": False, "num_warps": 1}


def decode_jobs(dtype: torch.dtype, shape: tuple[int, int], v: Variant, routing: PrefillRouting) -> list[Job]:
    """For the short segments, if there are any."""
    if routing.short is None:
        return []
    config = choose(*shape, routing.short.slots.numel(), routing.short.max_tokens)
    fixed = decode_constants(config, *shape, v.two, v.one, v.group, v.salient)
    return [("decode", (dtype, *shape, config.split), fixed)]


def compile_jobs(jobs: list[Job], workers: int) -> list[str]:
    """What failed, as text."""
    unique = {}
    for kernel, (dtype, rows, width, *split), fixed in jobs:  # Triton sees of a size whether 16 divides it
        key = kernel, dtype, rows % 16, width % 16, *(s > 1 for s in split), repr(fixed)
        unique[key] = kernel, (dtype, rows, width, *split), fixed
    with ProcessPoolExecutor(min(workers, len(unique)), mp_context=get_context("spawn")) as pool:
        return [text for text in pool.map(_compile, unique.values(), chunksize=1) if text]


def _compile(job: Job) -> str:
    from meswitch.ops.triton_merge import merge_kernel, rows_kernel
    from ops_timing import Variant as Decode
    from ops_timing import _compile as compile_decode

    kernel, key, fixed = job
    if kernel == "decode":
        dtype, rows, width, split = key
        return compile_decode(Decode("decode", dtype, rows, width, split > 1, fixed))
    dtype, rows, width = key
    i32, i64 = torch.int32, torch.int64
    try:
        if kernel == "merge":
            merge_kernel.warmup(dtype, dtype, i32, i64, i32, 0, rows, width, rows, width, grid=(1, 1, 1), **fixed)
        else:
            pointers = i64, i32, dtype, dtype, dtype, i32, i64
            rows_kernel.warmup(*pointers, width, 0, rows, width, grid=(1, 1, 1), **fixed)
    except Exception as error:  # noqa: BLE001 - one variant that does not compile must not end the run
        return f"{kernel} {fixed}: {type(error).__name__}: {str(error)[:200]}"
    return ""

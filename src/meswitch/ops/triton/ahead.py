"""Compiling kernels before a step needs them, many at once: one takes seconds, and Triton compiles without the GIL."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from meswitch.ops.layout import Variant
from meswitch.ops.prefill import MERGED, fits
from meswitch.ops.routing import MAX_TOKENS, PIECE, TILE_TOKENS, bucket
from meswitch.ops.triton import on_hopper

if TYPE_CHECKING:
    from meswitch.ops.triton.items import FusedConfig, MergeTile


@dataclass(frozen=True, slots=True)
class Compilation:
    """A kernel and what Triton compiles it for: its arguments' types, what divides them, constants.

    Args:
        kernel: `fused`, `decode`, `merge`, `product`, `rows` or `dequantise`.
        dtype: in which the layer computes.
        rows: of the layer, or others of the same divisors; of `fused`, of each of its linears.
        in_features: likewise.
        constants: what the kernel is compiled for.
        scratch: of `decode`, whether its sums go through scratch memory.
    """

    kernel: str
    dtype: torch.dtype
    rows: int | tuple[int, ...]
    in_features: int
    constants: dict[str, Any]
    scratch: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for jobs that are one compilation."""
        constants = repr(sorted(self.constants.items()))
        rows = self.rows if isinstance(self.rows, tuple) else (self.rows,)
        return self.kernel, self.dtype, *(count % 16 for count in rows), self.in_features % 16, self.scratch, constants


def compile_ahead(jobs: Iterable[Compilation], workers: int | None = None) -> int:
    """Compile for the current device into memory and Triton's cache on disk; what is there already costs little.

    Args:
        workers: threads, by default one a core.

    Returns:
        How many kernels that were.
    """
    import triton

    unique = {job.key: job for job in jobs}
    if unique:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
            for job in unique.values():
                kernel, arguments = launched(job)
                kernel.warmup(*arguments, grid=(1, 1, 1), **job.constants)
    return len(unique)


def fused_job(
    rows: int | tuple[int, ...],
    in_features: int,
    variant: Variant,
    dtype: torch.dtype,
    config: "FusedConfig",
    bias: bool = False,
    again: bool = False,
    codes: torch.dtype | None = None,
) -> Compilation:
    """What `fused` launches.

    Args:
        rows: of the linear, or of each of those that are one launch.
        variant: that the deltas of all of them fit.
        again: of a routing of more pieces than likely ones.
        codes: dtype of the base's `Codes`, if it is held as such.
    """
    from meswitch.ops.triton.fused import fused_constants

    rows = (rows,) if isinstance(rows, int) else rows
    fixed = fused_constants(config, rows, in_features, variant, bias, again, codes)
    return Compilation("fused", dtype, rows, in_features, fixed)


def fused_jobs(
    rows: int | tuple[int, ...],
    in_features: int,
    variant: Variant,
    dtype: torch.dtype,
    bias: bool,
    sizes: Iterable[tuple[int, int, int]],
    codes: torch.dtype | None = None,
) -> Iterator[Compilation]:
    """What `fused_linears` launches in steps of so many (tokens, pieces, likely pieces); the rest as of `fused_job`."""
    from meswitch.ops.triton.items import choose_fused

    total = rows if isinstance(rows, int) else sum(rows)
    for tokens, pieces, likely in sizes:
        config = choose_fused(total, in_features, likely, bucket(tokens, least=8), variant.planes, codes)
        yield fused_job(rows, in_features, variant, dtype, config, bias, pieces > likely, codes)


def decode_job(
    rows: int, in_features: int, variant: Variant, dtype: torch.dtype, likely: int, piece: int = PIECE
) -> Compilation:
    """What `expert_linear` launches in a step of so many likely pieces of at most `piece` tokens."""
    from meswitch.ops.triton.decode import decode_constants
    from meswitch.ops.triton.items import choose

    config = choose(rows, in_features, likely, piece)
    fixed = decode_constants(config, rows, in_features, variant)
    return Compilation("decode", dtype, rows, in_features, fixed, config.split > 1)


def decode_jobs(
    rows: int, in_features: int, variant: Variant, dtype: torch.dtype, most: int, piece: int = PIECE
) -> Iterator[Compilation]:
    """What it launches in steps of up to `most` likely pieces."""
    for likely in range(1, most + 1):
        yield decode_job(rows, in_features, variant, dtype, likely, piece)


def merge_job(
    rows: int,
    in_features: int,
    variant: Variant,
    dtype: torch.dtype,
    experts: int,
    tile: "MergeTile | None" = None,
) -> Compilation:
    """What `merge` launches for up to `MERGED` experts."""
    from meswitch.ops.triton.items import MERGE_TILES
    from meswitch.ops.triton.merge import merge_constants, row_constants

    fixed = merge_constants(experts, tile or MERGE_TILES[experts], rows, in_features, variant, dtype)
    return Compilation("merge", dtype, rows, in_features, fixed | row_constants(variant))


def product_job(rows: int, in_features: int, variant: Variant, dtype: torch.dtype, bias: bool) -> Compilation:
    """What `product` launches."""
    from meswitch.ops.triton.product import product_constants

    return Compilation("product", dtype, rows, in_features, product_constants(variant, bias))


def prefill_jobs(
    rows: int, in_features: int, variant: Variant, dtype: torch.dtype, bias: bool, tokens: int
) -> Iterator[Compilation]:
    """What `expert_prefill` launches in steps of up to so many tokens."""
    if fits(rows, in_features, variant, dtype) and on_hopper(torch.device("cuda")):
        yield product_job(rows, in_features, variant, dtype, bias)
    for experts in range(1, MERGED + 1):
        yield merge_job(rows, in_features, variant, dtype, experts)
    yield from decode_jobs(rows, in_features, variant, dtype, bucket(-(-tokens // MAX_TOKENS)), MAX_TOKENS)


def embedding_job(rows: int, in_features: int, variant: Variant, dtype: torch.dtype, extra: bool) -> Compilation:
    """What `embedding_rows` launches. extra: experts have rows after the base's."""
    from meswitch.ops.triton.merge import row_constants

    return Compilation("rows", dtype, rows, in_features, row_constants(variant) | {"EXTRA": extra, "num_warps": 1})


def dequantise_job(rows: int, in_features: int, dtype: torch.dtype, codes: torch.dtype) -> Compilation:
    """What `Codes.into` launches."""
    from meswitch.ops.triton.codes import dequantise_constants

    fixed = dequantise_constants(rows, in_features, codes)
    return Compilation("dequantise", dtype, rows, in_features, fixed)


def launched(job: Compilation) -> tuple[Any, tuple[Any, ...]]:
    """The kernel, and its arguments before the constants: dtypes for pointers, numbers of the right divisors, None."""
    from meswitch.ops.triton.codes import dequantise_kernel
    from meswitch.ops.triton.decode import decode_kernel
    from meswitch.ops.triton.fused import fused_kernel
    from meswitch.ops.triton.merge import merge_kernel, rows_kernel

    if job.kernel == "product":  # its language is not part of every Triton
        return _product(job)
    if job.kernel == "fused":
        return fused_kernel, _of_fused(job)
    kernels = {
        "decode": decode_kernel,
        "dequantise": dequantise_kernel,
        "merge": merge_kernel,
        "rows": rows_kernel,
    }
    own, i32, i64, f32, rows, width = job.dtype, torch.int32, torch.int64, torch.float32, job.rows, job.in_features
    tables = i32, i64, i32, i32, i32  # arena, table, slots, starts, order
    arguments = {
        "decode": (own, own, *tables, f32 if job.scratch else i32, i32, width, rows, rows, width, 2, 2),
        "dequantise": (torch.int8, f32, own, rows, width),
        "merge": (own, own, i32, i64, i32, 0, rows, width, rows, width),
        "rows": (i64, i32, *[own] * 3, i32, i64, width, 0, rows, width),
    }
    return kernels[job.kernel], arguments[job.kernel]


def _of_fused(job: Compilation) -> tuple[Any, ...]:
    from triton.runtime.jit import MockTensor

    assert isinstance(job.rows, tuple)
    count, width, i32 = len(job.rows), job.in_features, torch.int32

    def each(dtype: torch.dtype) -> tuple[Any, ...]:  # dtypes inside of tuples are not taken for tensors
        return (MockTensor(dtype),) * count

    weight, scale = (torch.int8, torch.float32) if job.constants["CODES"] else (job.dtype, job.dtype)
    return (
        *(job.dtype, each(job.dtype), each(weight), each(scale), each(job.dtype)),
        *(i32, each(torch.int64), i32, i32, i32, torch.float32, each(i32)),
        *(width, job.rows, (width,) * count, job.rows, width, *[2] * 7),
    )


def _product(job: Compilation) -> tuple[Any, tuple[Any, ...]]:
    from meswitch.ops.triton.product import descriptors, product_kernel

    assert isinstance(job.rows, int)
    own, i32, i64, rows, width = job.dtype, torch.int32, torch.int64, job.rows, job.in_features
    x, weight = (torch.empty(n, width, dtype=own, device="meta") for n in (TILE_TOKENS, rows))
    return product_kernel, (
        *(*descriptors(x, weight), own, i32, i64, i32, own, own),
        *(width, rows, rows, width),
    )

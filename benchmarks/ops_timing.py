"""Timing on a GPU: replays of CUDA graphs between events, medians; bandwidth; compiling ahead."""

import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import triton
import triton.language as tl

from ops_models import DEVICE


def graph_of(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()  # compiles, and creates handles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, repeats: int, warmups: int = 2) -> float:
    """Median milliseconds of one replay."""
    for _ in range(warmups):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def graph_ms(function: Callable[[], object], repeats: int = 7) -> float:
    return replay_ms(graph_of(function), repeats)


@triton.jit
def _copy_kernel(source, target, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


def copy_gb_s(gibibytes: int = 2) -> dict[str, float]:
    """Bytes read and written per second by large device-to-device copies, each way of copying."""
    source = torch.empty(gibibytes << 28, dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    ways: dict[str, Callable[[], object]] = {
        "memcpy": lambda: target.copy_(source),
        "elementwise": lambda: torch.neg(source, out=target),
        **{
            f"triton_{block}": lambda b=block: _copy_kernel[(source.numel() // b,)](
                source, target, BLOCK=b, num_warps=4
            )
            for block in (1024, 4096, 16384)
        },
    }
    return {name: 8 * source.numel() / graph_ms(way) / 1e6 for name, way in ways.items()}


def read_gb_s(gibibytes: int = 4) -> float:
    """Bytes per second of a reduction, which writes nothing."""
    source = torch.empty(gibibytes << 28, dtype=torch.float32, device=DEVICE).normal_()
    return 4 * source.numel() / graph_ms(lambda: source.sum()) / 1e6


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel to compile: `decode` or `fused`, for the types and divisibilities that Triton specialises on."""

    kernel: str
    dtype: torch.dtype
    rows: int
    width: int
    split: bool
    constants: dict

    @property
    def key(self) -> tuple:
        return self.kernel, self.dtype, self.rows % 16, self.width % 16, self.split, repr(self.constants)


def compile_all(wanted: list[Variant], workers: int) -> list[str]:
    """Compile in parallel, into Triton's cache; what failed, as text."""
    unique = {variant.key: variant for variant in wanted}
    if not unique:
        return []
    print(f"{len(unique)} variants of kernels to compile", flush=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [text for text in pool.map(_compile, unique.values(), chunksize=1) if text]


def _compile(variant: Variant) -> str:
    from meswitch.ops.triton_decode import decode_kernel
    from meswitch.ops.triton_fused import fused_kernel

    v, i32 = variant, torch.int32
    tables = torch.int32, torch.int64, i32, i32, i32  # arena, table, slots, starts, order
    try:
        if v.kernel == "fused":
            pointers = (v.dtype, v.dtype, v.dtype, v.dtype, *tables, torch.float32, i32)
            sizes = (v.width, v.rows, v.width, v.rows, v.width, 2, 2, 2, 2, 2)
            fused_kernel.warmup(*pointers, *sizes, grid=(1,), **v.constants)
        else:
            pointers = (v.dtype, v.dtype, *tables, torch.float32 if v.split else i32, i32)
            decode_kernel.warmup(*pointers, v.width, v.rows, v.rows, v.width, grid=(1, 1, 1), **v.constants)
    except Exception as error:  # noqa: BLE001 - one variant that does not compile must not end the run
        return f"{v}: {type(error).__name__}: {str(error)[:200]}"
    return ""

"""Timing on a GPU: replays of CUDA graphs between events, medians."""

import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from ops_models import DEVICE


def graph_of(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()  # compiles, and creates handles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, repeats: int = 9, warmups: int = 2) -> float:
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


def graph_ms(function: Callable[[], None], repeats: int = 9) -> float:
    return replay_ms(graph_of(function), repeats)


def copy_gb_s(gigabytes: float = 4.0) -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    source = torch.empty(int(gigabytes * 1e9), dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_ms(lambda: target.copy_(source)) / 1e6


def read_gb_s(gigabytes: float = 4.0) -> float:
    """Bytes per second of a reduction, which writes nothing."""
    source = torch.empty(int(gigabytes * 1e9) // 4, dtype=torch.float32, device=DEVICE).normal_()
    return 4 * source.numel() / graph_ms(lambda: source.sum()) / 1e6


def compile_all(wanted: list[tuple[tuple, dict]], workers: int) -> list[str]:
    """Compile the decode kernel's variants in parallel, into Triton's cache; what failed, as text."""
    unique = {}
    for (dtype, rows, width, split), constants in wanted:  # Triton sees of a size whether 16 divides it
        key = dtype, rows % 16, width % 16, split > 1, repr(constants)
        unique[key] = (dtype, rows, width, split), constants
    if not wanted:
        return []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [text for text in pool.map(_compile, unique.values(), chunksize=1) if text]


def _compile(wanted: tuple[tuple, dict]) -> str:
    from meswitch.ops.triton_decode import decode_kernel

    (dtype, rows, width, split), constants = wanted
    work = torch.float32 if split > 1 else torch.int32
    pointers = (dtype, dtype, torch.int32, torch.int64, torch.int32, torch.int32, torch.int32, work, torch.int32)
    try:
        decode_kernel.warmup(*pointers, width, rows, rows, width, grid=(1, 1, 1), **constants)
    except Exception as error:  # noqa: BLE001 - one variant that does not compile must not end the run
        return f"{constants}: {type(error).__name__}: {str(error)[:200]}"
    return ""

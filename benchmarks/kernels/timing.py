"""Timing on a GPU: replays of CUDA graphs between events, medians; bandwidth."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.kernels.shapes import DEVICE


def measured_on() -> dict[str, Any]:
    """What a result says of where and when it was measured."""
    return {
        "card": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }


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


def in_turn_ms(graphs: Sequence[torch.cuda.CUDAGraph], repeats: int, warmups: int = 2) -> list[float]:
    """Median milliseconds of each, replayed in turn: long products heat a card, which slows what comes later."""
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
    for repetition in range(warmups + repeats):
        for graph, own in zip(graphs, marks, strict=True):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            if repetition >= warmups:
                own.append((first, last))
    torch.cuda.synchronize()
    return [statistics.median(first.elapsed_time(last) for first, last in own) for own in marks]


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

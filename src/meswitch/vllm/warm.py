"""Compiling the kernels of a server's steps before its first one: else each waits where it is first needed."""

import logging
import time
from collections.abc import Iterator, Sequence

import torch

from meswitch.ops.backend import KERNEL_DTYPES
from meswitch.ops.routing import MAX_TOKENS, most_pieces
from meswitch.ops.step import step_sizes
from meswitch.ops.triton.ahead import Compilation, compile_ahead, decode_jobs, embedding_job, fused_jobs, prefill_jobs
from meswitch.vllm.arena import Arena, Layer
from meswitch.vllm.layers import DeltaMethod
from meswitch.vllm.places import EMBEDDING, HEAD, LINEAR

log = logging.getLogger("vllm.meswitch")  # a child of vLLM's: its level, its handlers


def warm(arena: Arena, dtype: torch.dtype, rows: Sequence[int], most_tokens: int, specialized: bool) -> None:
    """Compile what the layers of an arena on a GPU launch.

    Args:
        dtype: of the activations. rows: of the steps that graphs hold, none if there are no graphs. most_tokens: of any
            step. specialized: see `ops.step.Side`.
    """
    if arena.device.type != "cuda":
        return
    started = time.monotonic()
    small = [count for count in rows if count <= MAX_TOKENS] or list(range(1, MAX_TOKENS + 1))
    with torch.cuda.device(arena.device):
        count = compile_ahead(
            job for layer in arena.layers for job in _jobs(layer, arena.count, dtype, small, most_tokens, specialized)
        )
    log.info("meswitch: %d kernels ready in %.1f s", count, time.monotonic() - started)


def _jobs(
    layer: Layer, slots: int, dtype: torch.dtype, rows: Sequence[int], most_tokens: int, specialized: bool
) -> Iterator[Compilation]:
    place, linear = layer.place, layer.slots
    if linear is None or dtype not in KERNEL_DTYPES:
        return
    method = place.module.quant_method
    about = linear.rows, linear.in_features, linear.variant, dtype
    if isinstance(method, DeltaMethod) and method.fused:
        bias = getattr(place.module, "bias", None) is not None
        counts = range(1, slots + 1) if specialized else [slots]
        yield from fused_jobs(*about, bias, {size for n in counts for size in step_sizes(rows, n)})
        yield from prefill_jobs(*about, bias, most_tokens)
        return
    if place.kind == EMBEDDING:
        yield embedding_job(*about, layer.extra is not None)
    if place.kind in (LINEAR, HEAD, EMBEDDING):  # an embedding may be the head as well
        yield from decode_jobs(*about, most_pieces(MAX_TOKENS, slots))
        yield from decode_jobs(*about, most_pieces(most_tokens, slots, MAX_TOKENS), MAX_TOKENS)

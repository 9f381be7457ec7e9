"""Compiling the kernels of all steps when an engine opens, many at once, so that none is compiled while it serves."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from meswitch.engine.batching import Batch
from meswitch.engine.coded import CodedLinear
from meswitch.engine.context import BASE_SLOT, Switch
from meswitch.engine.graphs import MOST
from meswitch.engine.layers import SwitchableEmbedding, SwitchableHead, SwitchableLinear
from meswitch.engine.pages import PAGE, pages_for
from meswitch.engine.proof import run
from meswitch.errors import MeswitchError
from meswitch.ops.routing import MAX_TOKENS, PIECE, bucket
from meswitch.ops.step import expert_counts, step_sizes
from meswitch.ops.triton.ahead import Compilation, compile_ahead, decode_jobs, embedding_job, fused_jobs, prefill_jobs
from meswitch.slots import ExpertStore

# Requests and tokens of each, for steps of every kind: deltas in the product, weights of an expert's own, many pieces.
PROMPTS = ((1, 24), (1, 100), (1, 512), (1, 2000), (3, 24), (8, 24), (32, 24), (8, 200))

logger = logging.getLogger("meswitch.opening")


def compile_kernels(model: Any, switch: Switch, slots: int, most_tokens: int) -> None:
    """Compile what the wrapped layers launch on the current GPU; what is in Triton's cache on disk costs little.

    Args:
        slots: of the expert store.
        most_tokens: of a step.
    """
    started = time.perf_counter()
    count = compile_ahead(_jobs(model, switch, slots, most_tokens))
    logger.info("%d kernels are ready in %.0f s", count, time.perf_counter() - started)


def _jobs(model: Any, switch: Switch, slots: int, most_tokens: int) -> Iterator[Compilation]:
    sizes = {size for count in expert_counts(slots) for size in step_sizes(range(1, MAX_TOKENS + 1), count)}
    seen: set[tuple[Any, ...]] = set()
    for module in model.modules():
        if not isinstance(module, SwitchableLinear | SwitchableHead | SwitchableEmbedding):
            continue
        layer = switch.kernel_layer(module.weight_name)
        if layer is None:
            continue
        base = module.base
        codes = base.held.codes.dtype if isinstance(base, CodedLinear) else None
        dtype = base.workspace.dtype if isinstance(base, CodedLinear) else base.weight.dtype
        about = layer.rows, layer.in_features, layer.variant, dtype
        is_table = isinstance(module, SwitchableEmbedding)
        biases = {False} if is_table else {False, base.bias is not None}
        if (key := (*about, codes, is_table, *biases)) in seen:
            continue
        seen.add(key)
        if is_table:
            yield embedding_job(*about, False)
        for bias in biases if not is_table else ():
            yield from fused_jobs(*about, bias, sizes, codes)
            yield from prefill_jobs(*about, bias, most_tokens)
        yield from decode_jobs(*about, bucket(min(most_tokens, MOST) // PIECE))


def run_prompts(
    batch: Batch, store: ExpertStore, experts: Sequence[str], kinds: Sequence[tuple[int, int]], longest: int
) -> None:
    """Run prompts of many lengths, so that libraries load their kernels now and not with the first request.

    Args:
        longest: text that the model takes, in tokens.
        experts: some of the store's; they take turns with the base.
        kinds: requests of a step, and tokens of each.
    """
    started = time.perf_counter()
    slots: list[int] = []
    try:
        for name in experts[: store.slot_count]:
            slots.append(store.acquire(name))
        for number, (requests, tokens) in enumerate(kinds):
            if tokens < longest and requests * pages_for(tokens + 1) * PAGE <= batch.kv_tokens:
                owners = [([*slots, BASE_SLOT] * requests)[place] for place in range(requests)]
                run(batch, f"warm-{number}", [[place % 7] * tokens for place in range(requests)], owners, 1)
    except MeswitchError as error:  # such as too little memory for the largest: requests will say so by name
        logger.warning("prompts that were run to be ready: %s", error)
    finally:
        for slot in slots:
            store.release(slot)
    logger.info("prompts of all kinds were run in %.0f s", time.perf_counter() - started)

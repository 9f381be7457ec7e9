"""What runs an engine's requests: the running batch where it is proven right, else experts by turns."""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from meswitch.artifact import Artifact
from meswitch.codec import EXACT
from meswitch.cpu import free_bytes
from meswitch.engine.attach import Survey, plan_attachment
from meswitch.engine.attention import PAGE, pages_for
from meswitch.engine.batching import Batch
from meswitch.engine.coded import CodedLinear, restore_weights
from meswitch.engine.context import BASE_SLOT, Switch
from meswitch.engine.graphs import MOST
from meswitch.engine.layers import SwitchableEmbedding, SwitchableHead, SwitchableLinear
from meswitch.engine.parameters import MergedWeights, StoredTensors
from meswitch.engine.proof import (
    PROOF_PAGES,
    TEXT,
    Proof,
    Steps,
    Trial,
    base_text,
    batch_runs_base,
    mixed_tokens,
    most_changed,
    run,
    text_fault,
    without_weights,
)
from meswitch.engine.request import Listener
from meswitch.engine.sampling import SamplingParams, SamplingState
from meswitch.engine.turns import Turns, longest_unturned
from meswitch.engine_options import EngineOptions
from meswitch.errors import IncompatibleError, MeswitchError
from meswitch.ops import BACKENDS, backend, uses_kernels
from meswitch.ops.routing import MAX_TOKENS, PIECE, Step, bucket, step_sizes
from meswitch.ops.triton.ahead import Compilation, compile_ahead, decode_jobs, embedding_job, fused_jobs, prefill_jobs
from meswitch.slots import ExpertStore
from meswitch.tokenizer import max_length

logger = logging.getLogger("meswitch.opening")  # of its own, for what is tried is quiet

# Requests and tokens of each, for steps of every kind: deltas in the product, weights of an expert's own, many pieces.
_PROMPTS = ((1, 24), (1, 100), (1, 512), (1, 2000), (3, 24), (8, 24), (32, 24), (8, 200))
_TRIED = 4  # experts that are loaded to find two that decode steps are proven with
_MERGED = 0.5  # of the memory that is free when an engine opens, for merged weights by default
_REPLAYED = 0.002  # of the norm of logits: less than a step of bfloat16, in which a library may sum in another order


class Runner(Protocol):
    """Answers requests. Its listeners are told all new tokens so far, whether that is all, and an error or None."""

    kv_tokens: int

    @property
    def kv_bytes(self) -> int: ...

    @property
    def kv_used_tokens(self) -> int: ...

    @property
    def merged_bytes(self) -> int: ...

    @property
    def graph_bytes(self) -> int: ...

    @property
    def merged_budget(self) -> int: ...

    @property
    def failure(self) -> str | None: ...

    @property
    def steps(self) -> int: ...  # grows while it gets on with its requests

    @property
    def sizes(self) -> Mapping[int, int]: ...  # requests of a step, or of a turn -> how many there were

    @property
    def threads(self) -> Mapping[str, threading.Thread]: ...  # what each does -> a thread that lives until `close`

    def submit(
        self,
        request: str,
        tokens: list[int],
        slot: int,
        params: SamplingParams,
        eos: list[int],
        listener: Listener,
        owner: str = "",
        sampling: SamplingState | None = None,
    ) -> None: ...

    def together(self) -> contextlib.AbstractContextManager[None]: ...  # what is submitted inside starts at once

    def cancel(self, request: str) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Opened:
    """A runner with the store of its experts.

    Args:
        reasons: why it is not the running batch, empty if it is.
        seconds: what the proof took, with the experts that it loaded.
    """

    runner: Runner
    store: ExpertStore
    reasons: tuple[str, ...]
    seconds: float = 0.0


def open_runner(
    model: Any,
    stored: StoredTensors,
    artifacts: Mapping[str, Artifact],
    options: EngineOptions,
) -> Opened:
    """Prove what can run these experts, and start it.

    Args:
        model: the base; the running batch wraps its modules in place.
        options: of the engine.

    Raises:
        IncompatibleError: `batch` is asked for and not right; the message names every module and the reason.
    """
    started = time.perf_counter()
    reasons = tuple(
        f"{name} is exact: its tensors are restored whole, one expert at a time; compress it with --bits 1 to 4 for a "
        "batch"
        for name, artifact in artifacts.items()
        if artifact.manifest.method.name == EXACT
    )
    vocabularies = [artifact.manifest.expert.vocab_size for artifact in artifacts.values()]
    vocabularies.append(model.get_input_embeddings().weight.shape[0])
    trial = Trial.of(model, min(vocabularies))
    if options.runner != "turns" and not reasons:
        found = _open_batch(model, stored, artifacts, options, trial, max(vocabularies))
        if isinstance(found, Opened):
            return dataclasses.replace(found, seconds=time.perf_counter() - started)
        reasons = found
    if options.runner == "batch":
        raise IncompatibleError(
            f"{type(model).__name__} cannot be served in a running batch (--runner turns serves it): "
            + "; ".join(reasons)
        )
    model.set_attn_implementation(attention_for(type(model)))  # a batch that failed may leave its own
    restore_weights(model)  # in which each expert's are put
    device = next(model.parameters()).device
    store = ExpertStore(
        artifacts,
        device=device,
        slots=options.slots,
        host_bytes=options.host_bytes,
        tied=stored.tied,
        grows=options.grows,
    )
    turns = Turns(model, stored, store, trial, kv_tokens=options.kv_cache_tokens)
    return Opened(turns, store, reasons, time.perf_counter() - started)


def _open_batch(
    model: Any,
    stored: StoredTensors,
    artifacts: Mapping[str, Artifact],
    options: EngineOptions,
    trial: Trial,
    vocabulary: int,
) -> Opened | tuple[str, ...]:
    """The running batch, or all reasons why not."""
    turns_at = longest_unturned(model.config)
    if turns_at is not None and options.kv_cache_tokens - PAGE > turns_at:
        return (
            f"rope_parameters: longrope turns a whole step otherwise once one text in it is longer than {turns_at} "
            f"tokens; kv_cache_tokens of at most {turns_at + PAGE} keep texts shorter",
        )
    switch = Switch()
    with _quiet():
        try:
            own = attention_for(type(model))
            sizes_of = {"max_batch_tokens": options.max_batch_tokens, "kv_tokens": options.kv_cache_tokens}
            batch = Batch(model, switch, attention=own, **sizes_of)
        except (MeswitchError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
            return (_batching_fails(error),)
        try:
            found = _proven(model, stored, artifacts, options, batch, switch, trial, vocabulary)
        except BaseException:
            batch.close()
            raise
        if not isinstance(found, Opened):
            batch.close()
    return found


def _proven(
    model: Any,
    stored: StoredTensors,
    artifacts: Mapping[str, Artifact],
    options: EngineOptions,
    batch: Batch,
    switch: Switch,
    trial: Trial,
    vocabulary: int,
) -> Opened | tuple[str, ...]:
    """The running batch with its layers wrapped and proven, or all reasons why not; the model is then as it was."""
    device = next(model.parameters()).device
    survey = Survey(model, switch)
    try:
        batch_runs_base(batch, trial, survey, "survey")
    except MeswitchError as error:
        return (_batching_fails(error),)
    if batch.unmixed:
        return (
            f"layers {', '.join(map(str, batch.unmixed[:4]))}: have no attention that keeps a step's requests apart",
        )
    attachment = plan_attachment(model, stored, survey, vocabulary)
    if attachment.idle:
        try:
            batch_runs_base(batch, trial, without_weights(model, attachment.idle), "idle")
        except MeswitchError:
            return (f"{attachment.idle[0]}: is not called, yet text cannot be computed without it",)
    if attachment.reasons:
        return attachment.reasons
    kernel = uses_kernels(options.asked_backend, device, model.dtype)
    store = ExpertStore(
        artifacts,
        device=device,
        slots=options.slots,
        host_bytes=options.host_bytes,
        kernel=attachment.kernel if kernel else False,
        tied=stored.tied,
        grows=options.grows,
    )
    budget = 0 if kernel else merged_budget(options.merged_bytes, device, model.dtype)
    deltas = BACKENDS["reference"] if kernel else backend(device.type, options.asked_backend)
    capacity = max(options.max_batch_tokens, MAX_TOKENS)
    recorded = MOST if options.cuda_graphs else MAX_TOKENS  # without graphs no step reads the larger buffers
    buffers = Step(capacity, store.slot_count, device, specialized=True, recorded=recorded) if kernel else None
    switch.connect(store, deltas, MergedWeights(budget) if budget else None, buffers)
    attachment.apply(model, switch)
    if kernel and device.type == "cuda":
        with torch.cuda.device(device):
            _compile_kernels(model, switch, store.slot_count, options.max_batch_tokens)
    proof = Proof(model, batch, switch, attachment, stored, survey, store)
    try:
        faults = proof.faults(artifacts, trial)
    except MeswitchError as error:
        faults = [f"a mixed step fails: {error}"]
    if faults:
        attachment.undo(model)
        return tuple(faults)
    longest = min(max_length(model.config), options.kv_cache_tokens)
    if kernel and device.type == "cuda":
        _run_prompts(batch, store, [], longest)
        _run_prompts(batch, store, list(artifacts)[:2], longest)
    if kernel and options.cuda_graphs:
        started = time.perf_counter()
        reason = _speed_up(proof, artifacts, trial, longest)
        if reason is None:
            logger.info("steps from tables are ready in %.0f s", time.perf_counter() - started)
        else:
            try:
                batch.compute_eagerly()
            except MeswitchError as error:
                attachment.undo(model)
                return (f"steps from tables end the batch: {error}",)
            logger.warning("steps run without CUDA graphs, which is slower: %s", reason)
    batch.forget_pace()
    if kernel and device.type == "cuda":  # what steps take now that all of it is compiled
        _run_prompts(batch, store, list(artifacts)[:2], longest)
    return Opened(batch, store, ())


def _speed_up(proof: Proof, artifacts: Mapping[str, Artifact], trial: Trial, longest: int) -> str | None:
    """Let steps run over static buffers, on a GPU as CUDA graphs; why not, None if they do.

    The buffers are proven like any step, with experts that are wholly in tables. A graph records the same operations,
    so what it gives is the same: each size is replayed with experts in it, and a text of several pages is continued.

    Args:
        longest: text that the model and the cache take, in tokens.
    """
    batch, store, tied = proof.batch, proof.store, proof.stored.tied
    try:
        paged = base_text(batch) if longest > TEXT else []
        # steps of more rows are proven with a prompt of more than a page beside two others
        is_large = longest > TEXT and batch.kv_tokens >= PROOF_PAGES * PAGE
        batch.compute_from_tables(store.slot_count, _ranks(artifacts, tied), MOST if is_large else MAX_TOKENS)
        found = _in_tables(batch, store, artifacts)
        if artifacts and not found:
            return "no expert has all of its tensors in tables"
        batch_runs_base(batch, trial, contextlib.nullcontext(), "decode")
        before = batch.table_steps
        sizes = batch.static_sizes
        kinds: tuple[Steps, ...] = ("tokens", "prompts") if sizes[-1] > MAX_TOKENS else ("tokens",)
        for steps in kinds:
            if faults := proof.faults(found, trial, steps):
                return faults[0]
        if found and batch.table_steps == before:
            return "no step of the proof was computed from tables"
        if batch.device.type != "cuda":
            return None

        def given(size: int, experts: int) -> list[tuple[str, int, Tensor]]:
            with batch.graphs_of_at_least(experts):
                return mixed_tokens(batch, store, found, trial, size, min(experts, 2))

        wanted = [given(*graph) for graph in batch.static_graphs]
        batch.capture(_told)
        for (size, experts), recorded in zip(batch.static_graphs, wanted, strict=True):
            if fault := _replay_fault(recorded, given(size, experts)):
                return f"{size} rows of {experts} experts: {fault}"
        batch_runs_base(batch, trial, contextlib.nullcontext(), "replay")
        return text_fault(paged, base_text(batch)) if paged else None
    except Exception as error:
        logger.debug("steps over static buffers", exc_info=error)
        return (str(error).strip() or type(error).__name__).partition("\n")[0]


def _in_tables(batch: Batch, store: ExpertStore, artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Two experts that are wholly in tables, of those that change most."""
    found: dict[str, Artifact] = {}
    for name in most_changed(artifacts)[:_TRIED]:
        slot = store.acquire(name)
        try:
            if batch.in_tables(slot):
                found[name] = artifacts[name]
        finally:
            store.release(slot)
        if len(found) == 2:
            break
    return found


def _replay_fault(wanted: list[tuple[str, int, Tensor]], found: list[tuple[str, int, Tensor]]) -> str | None:
    """How a replayed graph's logits differ from what it recorded, None if they do not."""
    base = {token: logits for name, token, logits in wanted if not name}
    for (name, token, logits), (_, _, ours) in zip(wanted, found, strict=True):
        finite = logits.isfinite()
        if not torch.equal(finite, ours.isfinite()):
            return "a replayed graph's logits are infinite for other tokens than what it recorded"
        error, size = float((ours - logits)[finite].norm()), float(logits[finite].norm())
        limit = _REPLAYED * size
        if name and token in base:  # less than a tenth of what the expert changes
            both = finite & base[token].isfinite()
            limit = min(limit, 0.1 * float((logits - base[token])[both].norm()))
        if not error <= limit:
            share = error / max(size, 1e-30)
            return f"a replayed graph's logits differ by {share:.2g} of their norm from what it recorded"
    return None


def _ranks(artifacts: Mapping[str, Artifact], tied: Mapping[str, str]) -> dict[str, int]:
    """Stored names of which some expert has a low-rank delta -> the highest rank. tied: see `StoredTensors`."""
    ranks: dict[str, int] = {}
    for artifact in artifacts.values():
        for name, entry in artifact.manifest.tensors.items():
            if entry.kind == "lowrank":
                ranks[name] = max(ranks.get(name, 0), entry.stored["weight_left"].shape[1])
    return ranks | {name: ranks[source] for name, source in tied.items() if source in ranks}


def _told(done: int, total: int) -> None:
    logger.info("capturing CUDA graphs: %d of %d", done, total)


def merged_budget(wanted: int | None, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes for merged weights of experts in the running batch.

    In 16 bit the sum of a weight and a small change is rounded to the weight's steps, which can lose as much as the
    compression itself: there it is done only if a budget is set.

    Args:
        wanted: the setting; None for a share of the memory that is free, on a CPU in float32.
    """
    if wanted is not None:
        return wanted
    return int(_MERGED * free_bytes()) if device.type == "cpu" and dtype == torch.float32 else 0


def _batching_fails(error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return f"the running batch cannot run this base: {reason}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What fails while it is tried is told once, as a reason, not in the log as well."""
    logger = logging.getLogger("meswitch.engine")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def attention_for(model_class: Any) -> str:
    """The attention that a model of this class is loaded with."""
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def compute_dtype(dtype: str, device: torch.device) -> Any:
    """As `from_pretrained` takes it: float32 on a CPU, the checkpoint's on a GPU, unless one is named."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, dtype)


def _compile_kernels(model: Any, switch: Switch, slots: int, most_tokens: int) -> None:
    """Compile what the wrapped layers launch on the current GPU; what is in Triton's cache on disk costs little.

    Args:
        slots: of the expert store.
        most_tokens: of a step.
    """
    started = time.perf_counter()
    count = compile_ahead(_jobs(model, switch, slots, most_tokens))
    logger.info("%d kernels are ready in %.0f s", count, time.perf_counter() - started)


def _jobs(model: Any, switch: Switch, slots: int, most_tokens: int) -> Iterator[Compilation]:
    sizes = step_sizes(range(1, MAX_TOKENS + 1), slots, specialized=True)
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
    for group in {one.joined for one in model.modules() if isinstance(one, SwitchableLinear) and one.joined}:
        yield from group.jobs(sizes)


def _run_prompts(batch: Batch, store: ExpertStore, experts: Sequence[str], longest: int) -> None:
    """Run prompts of many lengths, so that libraries load their kernels now and not with the first request.

    Args:
        experts: some of the store's; they take turns with the base.
        longest: text that the model takes, in tokens.
    """
    started = time.perf_counter()
    slots: list[int] = []
    try:
        for name in experts[: store.slot_count]:
            slots.append(store.acquire(name))
        for number, (requests, tokens) in enumerate(_PROMPTS):
            if tokens < longest and requests * pages_for(tokens + 1) * PAGE <= batch.kv_tokens:
                owners = [([*slots, BASE_SLOT] * requests)[place] for place in range(requests)]
                run(batch, f"warm-{number}", [[place % 7] * tokens for place in range(requests)], owners, 1)
    except MeswitchError as error:  # such as too little memory for the largest: requests will say so by name
        logger.warning("prompts that were run to be ready: %s", error)
    finally:
        for slot in slots:
            store.release(slot)
    logger.info("prompts of all kinds were run in %.0f s", time.perf_counter() - started)

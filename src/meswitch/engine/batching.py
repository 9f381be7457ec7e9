"""The running batch: transformers' continuous batching, told before each step which expert owns which tokens.

Block sharing stays off: it finds equal prefixes by their tokens alone and would answer one expert's request from
another's KV blocks.
"""

import dataclasses
import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from meswitch.engine.attention import BY_REQUEST, Spans, say
from meswitch.engine.context import BASE_SLOT, StepContext, Switch
from meswitch.engine.faults import FaultIsolation, Step
from meswitch.engine.sampling import Sampler, SamplingParams, StepSampler
from meswitch.errors import MeswitchError
from meswitch.threads import StepThreads

logger = logging.getLogger("meswitch.engine")

PAGE = 64  # tokens of a block of the KV cache
# (all tokens so far, finished, error text or None)
Listener = Callable[[list[int], bool, str | None], None]


class Batch:
    """Runs requests; each belongs to a slot of the expert store, or to the base.

    Args:
        model: the base with switchable layers. kv_tokens: tokens that the KV cache holds, in pages of `PAGE`.
    """

    def __init__(self, model: Any, switch: Switch, *, max_batch_tokens: int, kv_tokens: int) -> None:
        self.kv_tokens = kv_tokens
        pages = max(1, -(-kv_tokens // PAGE))
        self._switch = switch
        self._device = next(model.parameters()).device
        self.dtype: torch.dtype = model.dtype
        self._threads = StepThreads(self._device, model.config.get_text_config().hidden_size)
        self._slots: dict[str, int] = {}
        self._listeners: dict[str, Listener] = {}
        self._cancelled: set[str] = set()
        self._begun: set[str] = set()  # requests that some step has held
        self._errors: dict[str, str] = {}  # of requests that failed within a step
        self._lock = threading.Lock()
        self._sampler = StepSampler(model.dtype, self._fail)
        config = _config(
            page_size=PAGE,
            num_blocks=pages,
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=min(256, max_batch_tokens),
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            max_blocks_per_request=0,
            auto_switch_to_flash=False,
        )
        generation = GenerationConfig(do_sample=False, max_new_tokens=16, eos_token_id=-1, pad_token_id=0)
        self._hook = model.register_forward_pre_hook(self._before_step, with_kwargs=True)
        self._faults = FaultIsolation(model, self._fail)
        self._manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=config)
        self._layout: tuple[Any, ...] = ()
        self._context = StepContext()
        self.watch = Watch()
        processors = self._manager.logit_processor
        processors.logits_processor.extend([self.watch, self._sampler])
        processors.do_processing = True
        self._window: int | None = getattr(model.config.get_text_config(), "sliding_window", None)
        self._attends = self._device.type == "cpu" and model.config.get_text_config()._attn_implementation == "sdpa"
        if self._attends:  # the manager has checked "sdpa"; for any other its mask is left out
            model.set_attn_implementation(BY_REQUEST)
            self._attends = model.config.get_text_config()._attn_implementation == BY_REQUEST
        self._order_by_owner()
        if self._device.type == "cpu":  # another thread would only take the steps' time, and wake up for each token
            self._manager.output_router.deliver_batch = self._take
        with torch.inference_mode():  # which the loop's thread takes over
            self._manager.start()
        self._reader = threading.Thread(target=self._read, name="meswitch-results", daemon=True)
        self._stopping = False
        self._reader.start()

    def submit(
        self, request: str, tokens: list[int], slot: int, params: SamplingParams, eos: list[int], listener: Listener
    ) -> None:
        """Start a request. The listener is called from the engine's thread, with all tokens so far each time."""
        with self._lock:
            self._slots[request] = slot
            self._listeners[request] = listener
            if params.temperature > 0:
                self._sampler.samplers[request] = Sampler(params)
        accepted = self._manager.add_request(
            tokens,
            request_id=request,
            max_new_tokens=params.max_new_tokens,
            streaming=True,
            eos_token_id=eos or -1,
        )
        if accepted is None:
            with self._lock:
                self._drop(request)
            raise MeswitchError(f"the engine has stopped: {self.failure or 'it was closed'}; start it again")

    def cancel(self, request: str) -> None:
        """End a request early. Its listener is told `finished` once no step can touch it any more."""
        with self._lock:
            if request in self._listeners:
                self._cancelled.add(request)
        self._manager.cancel_request(request)

    def close(self) -> None:
        self._stopping = True
        if self._manager.batch_processor is None:  # nothing was served yet: stopping is no cause for a warning
            logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        self._reader.join(timeout=5)
        self._hook.remove()
        self._faults.close()

    @property
    def kv_bytes(self) -> int:
        """Device memory of keys and values."""
        processor = self._manager.batch_processor
        if processor is None:
            return 0
        cache = processor.cache
        # one tensor in newer versions of transformers, two a layer in older ones
        tensors = [cache.cache_tensor] if hasattr(cache, "cache_tensor") else [*cache.key_cache, *cache.value_cache]
        return sum(int(tensor.nbytes) for tensor in tensors)

    @property
    def merged_bytes(self) -> int:
        """Memory of the weights that experts have of their own."""
        return 0 if self._switch.merged is None else self._switch.merged.nbytes

    @property
    def merged_budget(self) -> int:
        """Bytes that they may take."""
        return 0 if self._switch.merged is None else self._switch.merged.budget

    @property
    def failure(self) -> str | None:
        """Why the generation loop died, if it did."""
        status = getattr(self._manager, "background_thread_status", None)
        error = getattr(status, "fatal_error", None) or getattr(self._manager, "fatal_error", None)
        return None if error is None else str(error)

    def _before_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Map each token of the step to its expert's slot."""
        if "cu_seq_lens_q" not in kwargs:
            return
        self._threads.settle()  # the loop has no other place where it could be said
        batch = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        requests = [future.state.request_id for future in batch]
        with self._lock:
            slots = [self._slots.get(request, BASE_SLOT) for request in requests]
        bounds = kwargs["cu_seq_lens_q"][: len(requests) + 1].tolist()
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        rows = kwargs.get("logits_indices")
        padding = kwargs["input_ids"].shape[1] - bounds[-1]

        positions = None if rows is None else rows.tolist()

        def place(slots: Sequence[int]) -> None:
            layout = (lengths, requests, slots, positions, padding)
            if layout != self._layout:  # of most steps it is that of the step before
                self._layout = layout
                self._context = StepContext.build(lengths, requests, slots, positions, padding, self._device)
            self._switch.step = self._context

        if self._attends:
            for kind, ends in kwargs["cu_seq_lens_k"].items():
                keys = ends[: len(requests) + 1].tolist()
                spans = Spans(bounds, keys, self._window if kind == "sliding_attention" else None)
                index = self._manager.batch_processor.cache.cache_allocators[kind].index
                if kind == "full_attention" and len(kwargs["read_index"][index]):
                    kwargs["read_index"][index] = spans.read(kwargs["read_index"][index])
                say(ends, spans)
        place(slots)
        self._sampler.rows = self.watch.rows = self._switch.step.row_request
        started = any(length > 1 and request in self._begun for length, request in zip(lengths, requests, strict=True))
        self._begun.update(requests)
        self._faults.step = Step(requests, slots, lengths, started, place)

    def _order_by_owner(self) -> None:
        """Let every step have the rows of one owner side by side: its products need no gathering then."""
        create = self._manager._create_batch_processor

        def created() -> Any:
            processor = create()
            inputs = processor.inputs_and_outputs
            prepare = inputs.prepare_batch_tensors

            def ordered(requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
                with self._lock:
                    slots = dict(self._slots)
                requests_in_batch.sort(key=lambda future: slots.get(future.state.request_id, BASE_SLOT))
                prepare(requests_in_batch, *args, **kwargs)

            inputs.prepare_batch_tensors = ordered
            if self._attends:  # nothing is compiled: no need to guard against it in every layer
                cache = processor.cache
                cache.update = inspect.unwrap(type(cache).update).__get__(cache)
            return processor

        self._manager._create_batch_processor = created

    def _fail(self, request: str, error: str) -> None:
        """End a request whose step went wrong. From the generation loop's thread."""
        with self._lock:
            if request in self._listeners:
                self._errors[request] = error
            self._sampler.samplers.pop(request, None)
        self.cancel(request)

    def _read(self) -> None:
        """Hand results to their listeners."""
        while not self._stopping:
            output = self._manager.get_result(timeout=0.01 if self._cancelled else 0.2)
            if output is not None:
                self._take([output])
            elif self.failure is not None:
                self._fail_all(self.failure)
                return
            for request in [r for r in self._cancelled if self._is_gone(r)]:
                self._tell(request, [], True, None)

    def _take(self, outputs: Sequence[Any]) -> None:
        """Results of a step."""
        for output in outputs:
            try:
                finished = output.is_finished()
                self._tell(output.request_id, list(output.generated_tokens), finished, output.error)
            except Exception:  # a listener's: the others' results come in the same thread
                logger.exception("the result of request %s cannot be told", output.request_id)

    def _tell(self, request: str, tokens: list[int], finished: bool, error: str | None) -> None:
        with self._lock:
            listener = self._listeners.get(request)
            error = self._errors.get(request, error)
            if finished:
                self._drop(request)
        if listener is not None:
            listener(tokens, finished, error)

    def _is_gone(self, request: str) -> bool:
        """Whether a cancelled request has left the scheduler: then no later step holds its tokens."""
        processor = self._manager.batch_processor
        if processor is None:  # the loop is still starting
            return False
        scheduler = processor.scheduler
        queued = {state.request_id for state in list(self._manager.input_queue.queue)}
        return request not in queued | scheduler.active_requests.keys() | scheduler.waiting_requests.keys()

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            listeners = dict(self._listeners)
            for request in listeners:
                self._drop(request)
        for listener in listeners.values():
            listener([], True, reason)

    def _drop(self, request: str) -> None:
        self._cancelled.discard(request)
        self._begun.discard(request)
        self._errors.pop(request, None)
        self._listeners.pop(request, None)
        self._slots.pop(request, None)
        self._sampler.samplers.pop(request, None)


class Watch:
    """A logits processor that changes nothing and shows the logits to `see`, if somebody wants to look.

    Args:
        rows: the request of each row, filled before the step.
        see: is given `rows` and [rows, vocabulary] logits.
    """

    supports_continuous_batching = True

    def __init__(self) -> None:
        self.rows: tuple[str, ...] = ()
        self.see: Callable[[tuple[str, ...], Tensor], None] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.see is not None:
            self.see(self.rows, scores)
        return scores


def _config(**wanted: Any) -> ContinuousBatchingConfig:
    """The batching configuration, in the spelling of the installed transformers."""
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    if "page_size" not in known:
        wanted["block_size"] = wanted["page_size"]
    return ContinuousBatchingConfig(**{name: value for name, value in wanted.items() if name in known})

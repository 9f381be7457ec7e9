"""One base model in memory, many experts beside it, one running batch."""

import atexit
import dataclasses
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from meswitch.adapter import open_expert
from meswitch.architecture import Architecture, architecture_of
from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.engine.batching import PAGE
from meswitch.engine.context import BASE_SLOT
from meswitch.engine.parameters import StoredTensors
from meswitch.engine.request import Chunk, Completion, Request
from meswitch.engine.runner import RunnerName, Sizes, attention_for, compute_dtype, open_runner
from meswitch.engine.sampling import SamplingParams
from meswitch.engine.turns import Turns
from meswitch.errors import CapacityError, ConfigError, MeswitchError, UnknownExpertError
from meswitch.loaded import load_model
from meswitch.tokenizer import ChatTokenizer, Prompt

logger = logging.getLogger("meswitch.engine")

# After so many later requests went first, a request whose expert found no slot closes the door behind it.
_MAX_BYPASSES = 32


class Engine:
    """Generates with the base and with any of its experts, in one batch.

    Args:
        base: checkpoint directory or hub id. base_name: the base's own name.
        experts: directories of artifacts, or of PEFT adapters, by name.
        device: `auto`, `cpu` or `cuda`. dtype: `auto` (float32 on a CPU, the checkpoint's on a GPU) or a name.
        slots: experts on the device at a time. host_bytes: budget for experts in host memory, None for no limit.
        merged_bytes: budget for experts' merged weights where no kernels run, which makes a CPU several times as fast;
            None for half of the memory that is free in float32 on a CPU, 0 for none.
        max_batch_tokens: tokens of one step. kv_cache_tokens: tokens of all running requests together.
        max_queue: waiting and running requests; one more is refused.
        op_backend: what computes deltas: `triton` (bfloat16 or float16), `cpu` or `reference`; None is triton on a GPU,
            cpu elsewhere.
        runner: `batch`, one running batch for all experts; `turns`, one expert at a time, for any model; `auto`, the
            batch if it is proven right for this base and these experts when the engine opens.

    Raises:
        MeswitchError: see `meswitch.errors`: a damaged artifact, another base, a layer that cannot be switched.
    """

    def __init__(
        self,
        base: str | Path,
        experts: Mapping[str, str | Path],
        *,
        base_name: str = "base",
        device: str = "auto",
        dtype: str = "auto",
        slots: int = 4,
        host_bytes: int | None = None,
        merged_bytes: int | None = None,
        max_batch_tokens: int = 2048,
        kv_cache_tokens: int = 32768,
        max_queue: int = 1024,
        op_backend: str | None = None,
        runner: RunnerName = "auto",
    ) -> None:
        if base_name in experts or "auto" in (base_name, *experts):
            raise ConfigError(f"experts: the names {base_name!r} (the base's) and 'auto' are taken")
        self.base_name = base_name
        self.max_queue = max_queue
        checkpoint = Checkpoint.open(base)
        artifacts = {name: open_expert(path, checkpoint) for name, path in experts.items()}
        known = fingerprint(checkpoint) if artifacts else None
        for artifact in artifacts.values():
            artifact.check_base(checkpoint, known=known)
        target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.tokenizers = {base_name: ChatTokenizer.open(base_name, checkpoint.directory)}
        self.tokenizers |= {name: ChatTokenizer.open(name, artifact.directory) for name, artifact in artifacts.items()}
        architecture = architecture_of(checkpoint.config, text_only=True)
        stored = StoredTensors.of(architecture, checkpoint, artifacts.values())
        self.model = _load_model(architecture, checkpoint, target, dtype)
        sizes = Sizes(slots, host_bytes, max_batch_tokens, kv_cache_tokens, merged_bytes)
        opened = open_runner(self.model, stored, artifacts, sizes, wanted=runner, op_backend=op_backend)
        self.store, self._batch = opened.store, opened.runner
        self.by_turns = opened.reasons
        """Why experts take turns instead of sharing a batch, a line each; empty where they share one."""
        self.proof_seconds = opened.seconds
        """What it took to prove what runs, with the experts that were loaded for it."""
        self._ids = itertools.count()
        self._waiting: deque[Request] = deque()
        self._running: dict[str, tuple[Request, int]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._admission = threading.Thread(target=self._admit_forever, name="meswitch-admission", daemon=True)
        self._admission.start()
        atexit.register(self.close)  # the batch's thread must not outlive the interpreter's objects

    @property
    def names(self) -> list[str]:
        """The base's name, then the experts'."""
        return list(self.tokenizers)

    def submit(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        params: SamplingParams | None = None,
        on_chunk: Callable[[Chunk], None] | None = None,
    ) -> Request:
        """Queue a request and return at once.

        Args:
            prompt: text, chat messages or token ids. model: an expert's or the base's name (the default).
            on_chunk: called for each chunk from the engine's thread; it must not block.

        Raises:
            UnknownExpertError: no such model. ConfigError: a prompt that cannot be encoded or is too long.
            CapacityError: the queue is full.
        """
        name, params = model or self.base_name, params or SamplingParams()
        tokenizer = self.tokenizers.get(name)
        if tokenizer is None:
            raise UnknownExpertError(f"model {name!r} does not exist; there are {', '.join(self.names)}")
        tokens = tokenizer.encode(prompt)
        params = self._fit(tokenizer, len(tokens), params)
        request = Request(f"r{next(self._ids)}", name, tokens, params, tokenizer, on_chunk)
        with self._changed:
            if self._closed:
                raise MeswitchError("the engine is closed")
            if len(self._waiting) + len(self._running) >= self.max_queue:
                raise CapacityError(
                    f"the queue is full ({self.max_queue} requests); ask again later or raise engine.max_queue"
                )
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def generate(
        self, prompts: Sequence[Prompt], *, model: str | Sequence[str] | None = None, **params: Any
    ) -> list[Completion]:
        """Answer several prompts, all in one batch.

        Args:
            prompts: texts, lists of chat messages, or lists of token ids.
            model: one name for all, or one for each prompt. params: fields of `SamplingParams`.
        """
        models = [model] * len(prompts) if model is None or isinstance(model, str) else list(model)
        if len(models) != len(prompts):
            raise ConfigError(f"model: {len(models)} names for {len(prompts)} prompts")
        options = SamplingParams(**params)
        pairs = zip(prompts, models, strict=True)
        requests = [self.submit(prompt, model=name, params=options) for prompt, name in pairs]
        return [request.result() for request in requests]

    def stream(self, prompt: Prompt, *, model: str | None = None, **params: Any) -> Iterator[Chunk]:
        """Answer one prompt piece by piece; closing the iterator ends the request."""
        request = self.submit(prompt, model=model, params=SamplingParams(**params))
        try:
            yield from request
        finally:
            self.cancel(request)

    def cancel(self, request: Request) -> None:
        """End a request; without effect on one that is done."""
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
                request.fail("the request was cancelled")
            elif request.id in self._running:
                self._batch.cancel(request.id)
                request.fail("the request was cancelled")

    @property
    def merged_budget(self) -> int:
        """Bytes that merged weights of experts in the batch may take."""
        return self._batch.merged_budget

    @property
    def takes_turns(self) -> bool:
        """Whether one expert runs at a time: slower than a batch of all, for any model."""
        return isinstance(self._batch, Turns)

    def load(self) -> dict[str, int]:
        """Requests that wait and run now."""
        with self._changed:
            return {"waiting": len(self._waiting), "running": len(self._running)}

    @property
    def failure(self) -> str | None:
        """Why the engine cannot go on, or None while it can."""
        return self._batch.failure

    def memory(self) -> dict[str, int]:
        """Bytes by purpose: `base`, `slots`, `kv_cache` and `merged` on the device, and `host`.

        `merged` is what experts' weights take beside the base's: of those in the batch on a CPU (`merged_bytes`), or of
        the one that has its turn (`by_turns`).
        """
        seen = {p.data_ptr(): p.numel() * p.element_size() for p in self.model.parameters()}
        return {
            "base": sum(seen.values()),
            "slots": self.store.device_bytes,
            "kv_cache": self._batch.kv_bytes,
            "merged": self._batch.merged_bytes,
            "host": self.store.host.nbytes,
        }

    def close(self) -> None:
        """Stop the batch; what has not finished fails."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        atexit.unregister(self.close)
        self._admission.join(timeout=10)
        self._batch.close()
        with self._changed:
            left = [*self._waiting, *(request for request, _ in self._running.values())]
        for request in left:
            request.fail("the engine was closed")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fit(self, tokenizer: ChatTokenizer, prompt_tokens: int, params: SamplingParams) -> SamplingParams:
        limit = min(tokenizer.max_length, self._batch.kv_tokens - PAGE)
        if prompt_tokens >= limit:
            raise ConfigError(
                f"prompt: {prompt_tokens} tokens leave no room for an answer; {tokenizer.name!r} takes {limit} in all"
            )
        return dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, limit - prompt_tokens))

    def _admit_forever(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._waiting:
                    self._changed.wait()
                if self._closed:
                    return
                candidates = list(self._waiting)
            admitted = False
            for request in candidates:
                admitted = self._try_admit(request) or admitted
                if request.bypassed >= _MAX_BYPASSES and not request.done:
                    break
            if not admitted:
                with self._changed:
                    self._changed.wait(0.05)

    def _try_admit(self, request: Request) -> bool:
        """Start one waiting request if its expert has, or gets, a slot."""
        try:
            slot: int | None = BASE_SLOT
            if request.model != self.base_name:
                slot = self.store.try_acquire(request.model)
        except Exception as error:  # this thread admits all others too
            if not isinstance(error, MeswitchError):
                logger.exception("expert %s cannot be loaded", request.model)
            self._leave_queue(request)
            request.fail(str(error) or type(error).__name__)
            return True
        if slot is None:
            return False
        if not self._leave_queue(request, running_in=slot):  # cancelled meanwhile
            self._release(slot)
            return True

        def listen(tokens: list[int], finished: bool, error: str | None) -> None:
            self._on_tokens(request, slot, tokens, finished, error)

        try:
            self._batch.submit(request.id, request.prompt, slot, request.params, request.tokenizer.ends, listen)
        except Exception as error:  # this thread admits all others too
            if not isinstance(error, MeswitchError):
                logger.exception("request %s cannot be started", request.id)
            self._on_tokens(request, slot, [], True, str(error) or type(error).__name__)
        if request.done:  # cancelled between leaving the queue and joining the batch, which did not know it yet
            self._batch.cancel(request.id)
        return True

    def _leave_queue(self, request: Request, running_in: int | None = None) -> bool:
        with self._changed:
            if request not in self._waiting:
                return False
            for earlier in itertools.takewhile(lambda r: r is not request, self._waiting):
                earlier.bypassed += 1
            self._waiting.remove(request)
            if running_in is not None:
                self._running[request.id] = (request, running_in)
            return True

    def _on_tokens(self, request: Request, slot: int, tokens: list[int], finished: bool, error: str | None) -> None:
        """From the batch's thread. The slot is given back only when the batch is done with the request."""
        if error is not None:
            request.fail(f"model {request.model!r}: {error}")
        elif not request.done and request.feed(tokens, finished) and not finished:
            self._batch.cancel(request.id)  # a stop text: the batch does not know it
        if finished:
            self._release(slot)
            with self._changed:
                self._running.pop(request.id, None)
                self._changed.notify_all()

    def _release(self, slot: int) -> None:
        if slot != BASE_SLOT:
            self.store.release(slot)


def _load_model(architecture: Architecture, checkpoint: Checkpoint, device: torch.device, dtype: str) -> Any:
    """The base, as transformers loads it.

    Raises:
        CheckpointError: the checkpoint does not give every parameter.
    """
    model = load_model(
        checkpoint,
        architecture,
        compute_dtype(dtype, device),
        attn_implementation=attention_for(architecture.model_class),
    )
    model.generation_config = GenerationConfig()  # the base's own sampling defaults are not the experts'
    return model.to(device).eval()

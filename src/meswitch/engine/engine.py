"""One base model in memory, many experts beside it, one running batch."""

import atexit
import contextlib
import dataclasses
import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from meswitch.adapter import is_adapter, open_expert
from meswitch.architecture import Architecture, architecture_of
from meswitch.artifact import Artifact, fingerprint
from meswitch.artifact.manifest import MANIFEST_NAME
from meswitch.checkpoint import Checkpoint
from meswitch.engine.attention import PAGE
from meswitch.engine.coded import codes_bytes, codes_fault, hold_codes, restore_weights, workspace_bytes
from meswitch.engine.context import BASE_SLOT
from meswitch.engine.parameters import StoredTensors
from meswitch.engine.request import TRACE, Chunk, Completion, Request, stopped
from meswitch.engine.runner import attention_for, compute_dtype, open_runner
from meswitch.engine.sampling import SamplingParams
from meswitch.engine.turns import Turns
from meswitch.engine_options import EngineOptions
from meswitch.errors import (
    CapacityError,
    ConfigError,
    ContextLengthError,
    LoadError,
    MeswitchError,
    UnknownExpertError,
    check_names,
)
from meswitch.loaded import LazyModel, load_model
from meswitch.slots import Held, Version
from meswitch.threads import Watchdog, Watched, Workers
from meswitch.tokenizer import ChatTokenizer, Prompt

logger = logging.getLogger("meswitch.engine")


class Engine:
    """Generates with the base and with any of its experts, in one batch.

    Args:
        base: checkpoint directory or hub id.
        experts: directories of artifacts, or of PEFT adapters, by name.
        options: what it may take and how it computes; None for the defaults.
        settings: single options by name instead, such as `device="cuda", slots=8`.

    Raises:
        MeswitchError: see `meswitch.errors`: a damaged artifact, another base, a layer that cannot be switched.
    """

    def __init__(
        self,
        base: str | Path,
        experts: Mapping[str, str | Path],
        options: EngineOptions | None = None,
        **settings: Any,
    ) -> None:
        options = EngineOptions.of(options, settings)
        if options.base_name in experts or "auto" in (options.base_name, *experts):
            raise ConfigError(f"experts: the names {options.base_name!r} (the base's) and 'auto' are taken")
        target = options.target
        self.base_name = options.base_name
        self.max_queue = options.max_queue
        checkpoint = Checkpoint.open(base)
        artifacts = {name: open_expert(path, checkpoint) for name, path in experts.items()}
        self._checkpoint = checkpoint
        self._fingerprint = fingerprint(checkpoint) if artifacts else None
        for artifact in artifacts.values():
            artifact.check_base(checkpoint, known=self._fingerprint)
        self.tokenizers = {self.base_name: ChatTokenizer.open(self.base_name, checkpoint.directory)}
        self.tokenizers |= {name: ChatTokenizer.open(name, artifact.directory) for name, artifact in artifacts.items()}
        architecture = architecture_of(checkpoint.config, text_only=True)
        stored = StoredTensors.of(architecture, checkpoint, artifacts.values())
        takes_turns = options.runner == "turns"
        prepare = None if takes_turns else partial(hold_codes, backend=options.asked_backend, device=target)
        self.model = _load_model(architecture, checkpoint, target, options.dtype, prepare)
        opened = open_runner(self.model, stored, artifacts, options)
        self.store, self._batch = opened.store, opened.runner
        self.store.watch(self._accept, self.tokenizers)
        self.by_turns = opened.reasons
        """Why experts take turns instead of sharing a batch, a line each; empty where they share one."""
        self.proof_seconds = opened.seconds
        """What it took to prove what runs, with the experts that were loaded for it."""
        self._ids = itertools.count()
        self._waiting: dict[str, tuple[Request, Future[Held] | None]] = {}
        self._running: dict[str, tuple[Request, int]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._stopped: str | None = None
        self.observers: list[Callable[[Request], None]] = []
        """Each is told of every request that has ended, from any thread; it must not block."""
        # for the admission thread: a request, and what to do with it
        self._events: queue.SimpleQueue[tuple[Request, Callable[[], None]] | None] = queue.SimpleQueue()
        self._admission = threading.Thread(target=self._admit_forever, name="meswitch-admission", daemon=True)
        self._admission.start()
        self._admitted = 0
        self.generated_tokens = 0
        """Tokens of all answers so far."""
        self._helpers: dict[Workers, Watched] = {}
        self._lent: list[weakref.ref[nn.Module]] = []
        self._watchdog = Watchdog(self._watched(), self._report, also=self.store.end_overdue)
        atexit.register(self.close)  # the batch's thread must not outlive the interpreter's objects

    @property
    def names(self) -> list[str]:
        """The base's name, then the experts'."""
        return list(self.tokenizers)

    def add_expert(self, name: str, directory: str | Path) -> None:
        """Serve one more expert from now on, or another one under a name that is known.

        It must fit what the engine was opened with: tensors that some expert changed, stored in the same way, and not
        larger. Requests that run keep the expert that they began with.

        Args:
            name: of the expert.
            directory: of an artifact or a PEFT adapter.

        Raises:
            ConfigError: the name is taken by the base, or by `auto`.
            IncompatibleError: it does not fit.
            MeswitchError: see `Engine`.
        """
        if name in (self.base_name, "auto"):
            raise ConfigError(f"name: {name!r} is taken")
        artifact = open_expert(directory, self._checkpoint)
        artifact.check_base(self._checkpoint, known=self._fingerprint)
        tokenizer = ChatTokenizer.open(name, artifact.directory)
        self.store.add(name, artifact, tokenizer)
        with self._lock:
            self.tokenizers = {**self.tokenizers, name: tokenizer}  # others read it without the lock
        logger.info("expert %s is served", name)

    def remove_expert(self, name: str) -> None:
        """Serve an expert no more. Requests that wait for it fail; those that run go on.

        Raises:
            UnknownExpertError: no such expert.
        """
        self.store.remove(name)
        with self._lock:
            self.tokenizers = {known: one for known, one in self.tokenizers.items() if known != name}
        logger.info("expert %s is not served any more", name)

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
        request = self._request(prompt, model, params or SamplingParams(), on_chunk)
        self._enqueue(request)
        return request

    def _request(
        self,
        prompt: Prompt,
        model: str | None,
        params: SamplingParams,
        on_chunk: Callable[[Chunk], None] | None = None,
    ) -> Request:
        """A request that is not queued yet; arguments and errors as of `submit`."""
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"params: {params!r} is none; give meswitch.SamplingParams(...)")
        name = model or self.base_name
        tokenizer = self.tokenizers.get(name)
        if tokenizer is None:
            raise UnknownExpertError(f"model {name!r} does not exist; there are {', '.join(self.names)}")
        least = tokenizer.least_tokens(prompt)
        if least >= self._limit(tokenizer):
            raise self._too_long(tokenizer, f"at least {least}")
        tokens = tokenizer.encode(prompt)
        params = self._fit(tokenizer, len(tokens), params)
        trace, number = TRACE.get(), next(self._ids)
        return Request(
            f"{trace}-{number}" if trace else f"r{number}",
            name,
            tokens,
            params,
            tokenizer,
            on_chunk,
            said=prompt,
            on_end=self._observe,
            trace=trace,
        )

    def _enqueue(self, request: Request) -> None:
        """Queue it for admission; errors as of `submit`."""
        with self._lock:
            if self._closed:
                raise MeswitchError("the engine is closed")
            if self.failure is not None:
                raise stopped(self.failure)
            if len(self._waiting) + len(self._running) >= self.max_queue:
                raise CapacityError(
                    f"the queue is full ({self.max_queue} requests); ask again later or raise engine.max_queue"
                )
            self._waiting[request.id] = request, None
        self._events.put((request, partial(self._ask, request)))

    def generate(
        self, prompts: Sequence[Prompt], *, model: str | Sequence[str] | None = None, **params: Any
    ) -> list[Completion]:
        """Answer several prompts, all in one batch.

        Args:
            prompts: texts, lists of chat messages, or lists of token ids.
            model: one name for all, or one for each prompt. params: fields of `SamplingParams`.

        Raises:
            MeswitchError: as of `submit`, for any of the prompts; then none is answered.
            ConfigError: one prompt in place of several.
        """
        if isinstance(prompts, str) or any(isinstance(prompt, Mapping | int) for prompt in prompts):
            raise ConfigError("prompts: this is one prompt; give a list of prompts, [prompt]")
        models = [model] * len(prompts) if model is None or isinstance(model, str) else list(model)
        if len(models) != len(prompts):
            raise ConfigError(f"model: {len(models)} names for {len(prompts)} prompts")
        options = _sampling(params)
        pairs = zip(prompts, models, strict=True)
        requests = [self._request(prompt, name, options) for prompt, name in pairs]
        with self._batch.together():  # others wait meanwhile, so the prompts are read before
            try:
                for request in requests:
                    self._enqueue(request)
            except MeswitchError:
                for request in requests:
                    self.cancel(request)
                raise
            if requests:
                self._wait_for_admission(requests[-1])
        return [request.result() for request in requests]

    def stream(self, prompt: Prompt, *, model: str | None = None, **params: Any) -> Iterator[Chunk]:
        """Answer one prompt piece by piece; closing the iterator ends the request."""
        request = self.submit(prompt, model=model, params=_sampling(params))
        try:
            yield from request
        finally:
            self.cancel(request)

    def cancel(self, request: Request) -> None:
        """End a request; without effect on one that is done."""
        with self._lock:
            waited = self._waiting.pop(request.id, None)
            running = request.id in self._running
        if waited is not None:
            if waited[1] is not None:
                waited[1].cancel()  # one that has its slot already gives it back in `_arrived`
            request.fail("the request was cancelled")
        elif running:
            self._batch.cancel(request.id)
            request.fail("the request was cancelled")

    def prefetch(self, name: str) -> None:
        """Begin to bring an expert's weights to its slot, or at least into host memory; a request is on its way.

        Returns at once; what goes wrong is said to the request itself.
        """
        if name in self.store.artifacts:
            with contextlib.suppress(MeswitchError):
                self.store.prefetch(name)

    @property
    def merged_budget(self) -> int:
        """Bytes that merged weights of experts in the batch may take."""
        return self._batch.merged_budget

    @property
    def takes_turns(self) -> bool:
        """Whether one expert runs at a time: slower than a batch of all, for any model."""
        return isinstance(self._batch, Turns)

    @property
    def kv_tokens(self) -> int:
        """Tokens of all running requests together, at most."""
        return self._batch.kv_tokens

    @property
    def kv_used_tokens(self) -> int:
        """Tokens of the KV cache that running requests use."""
        return self._batch.kv_used_tokens

    @property
    def steps(self) -> int:
        """Steps that were begun."""
        return self._batch.steps

    def step_sizes(self) -> dict[int, int]:
        """Requests of a step -> steps; where experts take turns, requests of a turn -> turns."""
        return dict(self._batch.sizes)

    def load(self) -> dict[str, int]:
        """Requests that wait and run now."""
        with self._lock:
            return {"waiting": len(self._waiting), "running": len(self._running)}

    @property
    def failure(self) -> str | None:
        """Why the engine cannot go on, or None while it can."""
        return self._batch.failure or self._watchdog.failure or self._stopped

    def memory(self) -> dict[str, int]:
        """Bytes by purpose: `base`, `slots`, `kv_cache`, `merged`, `graphs` and `scratch` on the device, and `host`.

        `base` counts linear layers of a quantised base that are held as their codes by the codes' bytes; `scratch` is
        where one of them at a time is restored, by this engine and by each model that was lent its weights.
        `merged` is what experts' weights take beside the base's: of those in the batch on a CPU (`merged_bytes`), or of
        the one that has its turn (`by_turns`).
        """
        seen = {p.data_ptr(): p.numel() * p.element_size() for p in self.model.parameters()}
        return {
            "base": sum(seen.values()) + codes_bytes(self.model),
            "slots": self.store.device_bytes,
            "kv_cache": self._batch.kv_bytes,
            "merged": self._batch.merged_bytes,
            "graphs": self._batch.graph_bytes,
            "scratch": workspace_bytes(self.model)
            + sum(workspace_bytes(model) for one in self._lent if (model := one()) is not None),
            "host": self.store.host.nbytes,
        }

    def lend(self, model: nn.Module) -> None:
        """Count what a model on this engine's weights takes of its own, as long as it is there.

        Args:
            model: of a router, for instance.
        """
        self._lent.append(weakref.ref(model))

    def watch(self, what: str, workers: Workers) -> None:
        """Count the end of one of these threads as the engine's failure, too: what waits for them then fails.

        Args:
            what: they do.
            workers: of whoever asks the engine.
        """
        self._helpers[workers] = Watched(what, workers.are_alive)
        self._watchdog.watched.append(self._helpers[workers])

    def forget(self, workers: Workers) -> None:
        """Watch these no more, if they were watched; their end is meant then."""
        if workers in self._helpers:
            self._watchdog.watched.remove(self._helpers.pop(workers))

    def stop(self, reason: str) -> None:
        """Take no more requests, and end those that wait or run with an error: `failure` is the reason from now on."""
        self._stopped = self._stopped or reason
        self._fail_all(reason)

    def close(self) -> None:
        """Stop the batch; what has not finished fails."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._watchdog.close()
        self._events.put(None)
        atexit.unregister(self.close)
        self._admission.join(timeout=10)
        self.store.close()
        self._batch.close()
        with self._lock:
            left = [request for request, _ in (*self._waiting.values(), *self._running.values())]
        for request in left:
            request.fail("the engine was closed")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _limit(self, tokenizer: ChatTokenizer) -> int:
        """Tokens of a prompt and its answer together."""
        return min(tokenizer.max_length, self._batch.kv_tokens - PAGE)

    def max_length(self, model: str) -> int:
        """Tokens of a prompt and its answer together, for a model of `names`."""
        return self._limit(self.tokenizers[model])

    def _too_long(self, tokenizer: ChatTokenizer, tokens: str) -> ConfigError:
        takes = f"{tokenizer.name!r} takes {self._limit(tokenizer)} in all"
        return ContextLengthError(f"prompt: {tokens} tokens leave no room for an answer; {takes}")

    def _fit(self, tokenizer: ChatTokenizer, prompt_tokens: int, params: SamplingParams) -> SamplingParams:
        limit = self._limit(tokenizer)
        if prompt_tokens > limit or (prompt_tokens == limit and params.max_new_tokens):
            raise self._too_long(tokenizer, str(prompt_tokens))
        longest = min(params.max_new_tokens, limit - prompt_tokens)
        least = min(params.min_new_tokens, longest)
        return dataclasses.replace(params, max_new_tokens=longest, min_new_tokens=least)

    def _accept(self, before: Version, artifact: Artifact) -> ChatTokenizer:
        """A new version of an expert: of this base, with a tokenizer that can be used. From a loader's thread.

        Raises:
            MeswitchError: it is neither.
        """
        artifact.check_base(self._checkpoint, known=self._fingerprint)
        tokenizer: ChatTokenizer = before.made
        if artifact.manifest.companions != before.artifact.manifest.companions:
            tokenizer = ChatTokenizer.open(before.expert, artifact.directory)
        with self._lock:
            if before.expert in self.tokenizers:  # not unloaded meanwhile
                self.tokenizers = {**self.tokenizers, before.expert: tokenizer}
        logger.info("expert %s was replaced; requests that come from now on get the new version", before.expert)
        return tokenizer

    def _watched(self) -> list[Watched]:
        """The threads that requests need. Those that load experts must be there, but may take their time: a disk that
        does not answer stops the requests of its own experts alone."""

        def computes() -> bool:
            return bool(self._running)

        threads = [
            Watched(what, thread.is_alive, computes, lambda: self._batch.steps)
            for what, thread in self._batch.threads.items()
        ]
        admission = self._admission.is_alive
        return [
            Watched("admits requests", admission, lambda: not self._events.empty(), lambda: self._admitted),
            *threads,
            *(Watched(what, workers.are_alive) for what, workers in self.store.workers.items()),
        ]

    def _report(self, problem: str) -> None:
        """From the watchdog: what waits for a thread that is not there would wait for ever."""
        self._fail_all(problem)
        for workers in list(self._helpers):
            if not workers.are_alive():
                workers.fail(f"the engine has stopped: {problem}")

    def _fail_all(self, reason: str) -> None:
        """End what waits and runs: nothing more comes of it."""
        with self._lock:
            requests = [request for request, _ in (*self._waiting.values(), *self._running.values())]
        for request in requests:
            request.fail(f"the engine has stopped: {reason}")
            self.cancel(request)

    def _observe(self, request: Request) -> None:
        for observer in self.observers:
            observer(request)

    # Admission: a thread that asks for slots and starts requests. It never waits for one of them: an expert's load is
    # the store's business, and whatever goes wrong ends the request in question.

    def _admit_forever(self) -> None:
        while (event := self._events.get()) is not None:
            request, step = event
            self._admitted += 1
            try:
                step()
            except Exception:  # of this engine's own code: it is reported, and ends no other request
                logger.exception("request %s: admission", request.id)
                with contextlib.suppress(Exception):
                    request.fail(f"model {request.model!r}: the request cannot be admitted; see the log")
                    self.cancel(request)

    def _wait_for_admission(self, request: Request) -> None:
        """Until a request, and all before it, are in the batch; those whose experts must be loaded come later."""
        admitted = threading.Event()
        # once for who asks for a slot, and once more for who is given one at once
        self._events.put((request, lambda: self._events.put((request, admitted.set))))
        admitted.wait(timeout=1)

    def _ask(self, request: Request) -> None:
        """Ask for a request's slot."""
        try:
            if request.model == self.base_name:
                self._start(request, BASE_SLOT, self.base_name)
                return
            held = self.store.request(request.model)
        except Exception as error:  # noqa: BLE001 - whatever it is ends this request alone
            self._refuse(request, error)
            return
        with self._lock:
            waits = request.id in self._waiting
            if waits:
                self._waiting[request.id] = request, held
        if not waits:
            held.cancel()
        held.add_done_callback(lambda held: self._events.put((request, partial(self._arrived, request, held))))

    def _arrived(self, request: Request, found: "Future[Held]") -> None:
        """Start a request whose slot is there, or end one that gets none."""
        if found.cancelled():
            return
        reason = found.exception()
        if reason is not None:
            self._refuse(request, reason)
            return
        held = found.result()
        try:
            request.respell(held.version.made, self._fit)
        except Exception as error:  # noqa: BLE001 - whatever it is ends this request alone
            self._release(held.slot)
            self._refuse(request, error)
            return
        self._start(request, held.slot, held.version.key)

    def _refuse(self, request: Request, error: BaseException) -> None:
        """End a request that waits. The log says what the client must not see."""
        if isinstance(error, LoadError):
            cause = error.__cause__
            said = error if cause is None else f"{error} ({type(cause).__name__}: {cause})"
            logger.error("request %s: %s", request.id, said, exc_info=_if_unexpected(error))
        elif not isinstance(error, MeswitchError):
            logger.error("request %s cannot be admitted", request.id, exc_info=error)
        with self._lock:
            self._waiting.pop(request.id, None)
        known = isinstance(error, MeswitchError)
        request.fail(str(error) if known else f"model {request.model!r}: the request cannot be admitted; see the log")

    def _start(self, request: Request, slot: int, owner: str) -> None:
        """Hand a request to the batch. owner: the expert and its version, or the base."""
        with self._lock:
            waits = self._waiting.pop(request.id, None) is not None
            if waits:
                self._running[request.id] = request, slot
                request.started = time.perf_counter()
        if not waits:  # cancelled meanwhile
            self._release(slot)
            return

        def listen(tokens: list[int], finished: bool, error: str | None) -> None:
            self._on_tokens(request, slot, tokens, finished, error)

        try:
            self._batch.submit(
                request.id,
                request.prompt,
                slot,
                request.params,
                sorted(request.ends),
                listen,
                owner=owner,
                sampling=request.sampling,
            )
        except Exception as error:
            known = isinstance(error, MeswitchError)
            if not known:
                logger.exception("request %s cannot be started", request.id)
            listen([], True, str(error) if known else "the request cannot be started; see the log")
        if request.done:  # cancelled between leaving the queue and joining the batch, which did not know it yet
            self._batch.cancel(request.id)

    def _on_tokens(self, request: Request, slot: int, tokens: list[int], finished: bool, error: str | None) -> None:
        """From the batch's thread. The slot is given back only when the batch is done with the request."""
        self.generated_tokens += max(0, len(tokens) - len(request.tokens))  # this is one thread
        if error is not None:
            request.fail(f"model {request.model!r}: {error}")
        elif not request.done and request.feed(tokens, finished) and not finished:
            self._batch.cancel(request.id)  # a stop text: the batch does not know it
        if finished:
            self._release(slot)
            with self._lock:
                self._running.pop(request.id, None)

    def _release(self, slot: int) -> None:
        if slot != BASE_SLOT:
            self.store.release(slot)


def holds_expert(directory: str | Path) -> bool:
    """Whether a directory holds an artifact or a PEFT adapter, by the names of its files."""
    return is_adapter(directory) or (Path(directory) / MANIFEST_NAME).is_file()


def _sampling(params: Mapping[str, Any]) -> SamplingParams:
    """Of fields by name; raises ConfigError where there is no such field."""
    check_names(params, [field.name for field in dataclasses.fields(SamplingParams)], "field of SamplingParams")
    return SamplingParams(**params)


def _if_unexpected(error: LoadError) -> BaseException | None:
    """What a log needs the whole trace of: neither a disk's fault nor one that meswitch names."""
    cause = error.__cause__
    return None if cause is None or isinstance(cause, MeswitchError | OSError) else cause


def _load_model(
    architecture: Architecture,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: str,
    prepare: Callable[[LazyModel, Checkpoint], None] | None,
) -> Any:
    """The base, as transformers loads it.

    Args:
        prepare: of a quantised base, gives layers that keep their codes the places of others.

    Raises:
        CheckpointError: the checkpoint does not give every parameter.
    """
    model = load_model(
        checkpoint,
        architecture,
        compute_dtype(dtype, device),
        attn_implementation=attention_for(architecture.model_class),
        prepare=prepare,
    )
    model.generation_config = GenerationConfig()  # the base's own sampling defaults are not the experts'
    model = model.to(device).eval()
    if fault := codes_fault(model):
        logger.warning("the base's weights are restored in 16 bit, which takes twice the memory: %s", fault)
        restore_weights(model)
    return model

"""The running batch: a thread that computes steps of requests of all experts.

A step takes tokens of many requests at once (`scheduler`), each with its own expert's weights (`context`, `layers`) and
its own keys and values (`attention`). What a step raises, or a row without a finite logit, ends the requests that
caused it and no other.
"""

import contextlib
import inspect
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from meswitch.cpu import StepThreads
from meswitch.engine.attention import NAME, PAGE, KVCache, Pages, Piece, StepPlaces, pages_for, running
from meswitch.engine.context import BASE_SLOT, StepContext, Switch
from meswitch.engine.graphs import StaticSteps, own_tables
from meswitch.engine.request import Listener, stopped, tell
from meswitch.engine.sampling import Sampler, SamplingParams, SamplingState
from meswitch.engine.scheduler import Job, Pace, Scheduler
from meswitch.errors import CapacityError, ConfigError, IncompatibleError
from meswitch.threads import SAID_SECONDS, wait_for_end

logger = logging.getLogger("meswitch.engine")

T = TypeVar("T")

_MAX_REQUESTS = 256
_Told = tuple[str, Listener, list[int], bool, str | None]  # what `tell` takes


class Batch:
    """Runs requests; each belongs to a slot of the expert store, or to the base.

    Args:
        model: the base with switchable layers; its attention becomes ours.
        switch: is told before each step whose tokens are where.
        max_batch_tokens: of a step.
        kv_tokens: tokens that the KV cache holds, in pages of `PAGE`.
        attention: the model's own: `sdpa` or `eager`.

    Raises:
        IncompatibleError: the model has layers that a step cannot mix.
    """

    def __init__(
        self, model: Any, switch: Switch, *, max_batch_tokens: int, kv_tokens: int, attention: str = "sdpa"
    ) -> None:
        self.kv_tokens = kv_tokens
        self.dtype: torch.dtype = model.dtype
        self.failure: str | None = None
        """Why the thread that computes has ended, if it has."""
        self.see: Callable[[tuple[str, ...], Tensor], None] | None = None
        """Is shown each step's requests and their logits, [rows, vocabulary], if somebody wants to look."""
        self.steps = 0
        """Steps that were begun: whoever watches the thread that computes sees by it that it goes on."""
        self.sizes: Counter[int] = Counter()
        """Requests of a step -> steps."""
        self._model, self._switch = model, switch
        self.device = next(model.parameters()).device
        config = model.config.get_text_config()
        self._threads = StepThreads(self.device, config.hidden_size)
        self._cuts_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._pages = max(1, pages_for(kv_tokens))
        self._cache = KVCache(config, self._pages, attention, self.device)
        if not model._can_set_attn_implementation():
            raise IncompatibleError("its attention is its own, not one of transformers' interface")
        model.set_attn_implementation(NAME)
        self._scheduler = Scheduler(Pages(self._pages), max_batch_tokens, min(_MAX_REQUESTS, max_batch_tokens))
        self._sampler = Sampler(model.dtype)
        self._jobs: dict[str, Job] = {}  # of the computing thread, like all below
        self._commands: queue.SimpleQueue[Job | str | Callable[[], None] | None] = queue.SimpleQueue()
        self._entry = threading.Lock()  # between the look whether the batch goes on and the queue
        self._told: queue.SimpleQueue[_Told | None] = queue.SimpleQueue()
        self._held: list[_Told] = []
        self._layout: tuple[Any, ...] = ()
        self._context = StepContext()
        self._static: StaticSteps | None = None
        self._closing, self._open = threading.Event(), threading.Event()
        self._open.set()
        self._gathering = 0  # who are inside `together`
        self._computing = threading.Thread(target=self._run, name="meswitch-batch", daemon=True)
        self._telling = threading.Thread(target=self._tell_forever, name="meswitch-results", daemon=True)
        self._computing.start()
        self._telling.start()

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
    ) -> None:
        """Start a request.

        Args:
            request: its id.
            tokens: of the prompt.
            slot: of the expert store, or the base's.
            params: how it is continued.
            eos: tokens that end the answer.
            listener: is called from a thread of the batch and must not block, with all new tokens so far each time.
            owner: the expert and its version. Requests of one owner share the keys and values of equal beginnings; ""
                shares with nobody.
            sampling: what chooses its tokens; made of `params` if it is not given.

        Raises:
            ConfigError: there are no tokens. CapacityError: it may become longer than the cache. MeswitchError: the
                batch has ended.
        """
        if not tokens:
            raise ConfigError("prompt: it is empty")
        longest = len(tokens) + max(1, params.max_new_tokens)  # a prompt that is only scored gets a page for one, too
        if longest > self._pages * PAGE:
            raise CapacityError(f"{longest} tokens are more than the KV cache has, {self._pages * PAGE}")
        owner = f"expert {owner}" if owner else f"request {request}"
        job = Job(request, list(tokens), slot, owner, params, frozenset(eos), listener, sampling)
        with self._entry:
            if self._closing.is_set() or self.failure is not None:
                raise stopped(self.failure)
            self._commands.put(job)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Requests that are submitted inside start in the same step."""
        with self._entry:
            self._gathering += 1
            if not self._closing.is_set():
                self._open.clear()
        try:
            yield
        finally:
            with self._entry:
                self._gathering -= 1
                if not self._gathering:
                    self._open.set()

    def cancel(self, request: str) -> None:
        """End a request early. Its listener is told `finished` once no step can touch it any more."""
        self._commands.put(request)

    def compute_from_tables(self, slots: int, ranks: Mapping[str, int], rows: int) -> None:
        """Compute steps over static buffers from now on, where they fit.

        Args:
            slots: of the expert store.
            ranks: see `own_tables`.
            rows: of the largest such step.

        Raises:
            IncompatibleError: a layer of the model needs something else.
        """

        def prepare() -> None:
            self._switch.tables = own_tables(self._model, slots, ranks)
            self._static = StaticSteps(
                self._model,
                self._switch,
                self._cache,
                rows=min(rows, self._scheduler.max_tokens),
                requests=self._scheduler.max_requests,
                longest=self._pages * PAGE,
                cuts_rows=self._cuts_rows,
            )

        self._between_steps(prepare)

    def capture(self, told: Callable[[int, int], None]) -> None:
        """Record those steps as CUDA graphs, which replay them.

        Args:
            told: how many graphs are captured, of how many.

        Raises:
            Exception: whatever keeps the model from being recorded.
        """
        assert self._static is not None
        self._between_steps(partial(self._static.capture, told))

    @property
    def static_sizes(self) -> tuple[int, ...]:
        """Rows of the graphs."""
        return () if self._static is None else self._static.sizes

    @property
    def static_graphs(self) -> list[tuple[int, int]]:
        """Rows and experts of each graph."""
        return [] if self._static is None else self._static.graphs

    @contextlib.contextmanager
    def graphs_of_at_least(self, experts: int) -> Iterator[None]:
        """Compute steps meanwhile as if they had so many experts at least, by such graphs."""

        def choose(least: int) -> None:
            assert self._static is not None
            self._static.least_experts = least

        self._between_steps(partial(choose, experts))
        try:
            yield
        finally:
            self._between_steps(partial(choose, 0))

    @property
    def table_steps(self) -> int:
        """Steps with rows of experts that were computed from tables so far."""
        return 0 if self._static is None else self._static.expert_steps

    def in_tables(self, slot: int) -> bool:
        """Whether all that the expert in a slot has is in tables, or where the kernels read it."""

        def look() -> bool:
            assert self._switch.tables is not None
            return self._switch.tables.fill(slot, self._switch.tensors(slot))

        return self._between_steps(look)

    def compute_eagerly(self) -> None:
        """Compute all steps without static buffers from now on."""

        def drop() -> None:
            self._static = self._switch.tables = None

        self._between_steps(drop)

    def forget_pace(self) -> None:
        """Forget what steps with prompts took so far: the first of a kind compile kernels."""

        def forget() -> None:
            self._scheduler.pace = Pace()

        self._between_steps(forget)

    def _between_steps(self, work: Callable[[], T]) -> T:
        """Do something in the thread that computes, and wait for what it gives."""
        done: Future[T] = Future()

        def do() -> None:
            try:
                done.set_result(work())
            except Exception as error:  # noqa: BLE001  whatever it is, it is the caller's
                done.set_exception(error)

        with self._entry:
            if self._closing.is_set() or self.failure is not None:
                raise stopped(self.failure)
            self._commands.put(do)
        while not done.done():
            wait([done], timeout=1)
            if not self._computing.is_alive() and not done.done():
                raise stopped(self.failure)
        return done.result()

    @property
    def graph_bytes(self) -> int:
        """Device memory of the graphs and tables of steps over static buffers."""
        return 0 if self._static is None else self._static.nbytes

    def close(self) -> None:
        """End after the step that is being computed. The log says if that takes long, or does not end at all."""
        with self._entry:
            self._closing.set()
            self._open.set()
        self._commands.put(None)
        if wait_for_end(self._computing, "computes"):  # it has told then all that there was to tell
            self._told.put(None)
            wait_for_end(self._telling, "delivers answers", SAID_SECONDS)

    @property
    def threads(self) -> dict[str, threading.Thread]:
        """What each thread does -> the thread. None of them ends before the batch is closed."""
        return {"computes": self._computing, "delivers answers": self._telling}

    @property
    def kv_bytes(self) -> int:
        """Device memory of keys and values."""
        return self._cache.nbytes

    @property
    def kv_used_tokens(self) -> int:
        """Tokens of the cache that running requests use, in whole pages."""
        return (self._pages - self._scheduler.pages.available) * PAGE

    @property
    def merged_bytes(self) -> int:
        """Memory of the weights that experts have of their own."""
        return 0 if self._switch.merged is None else self._switch.merged.nbytes

    @property
    def merged_budget(self) -> int:
        """Bytes that they may take."""
        return 0 if self._switch.merged is None else self._switch.merged.budget

    @property
    def reused_tokens(self) -> int:
        """Tokens of prompts that were found in the cache."""
        return self._scheduler.reused

    @property
    def unmixed(self) -> list[int]:
        """Layers that no step's attention has reached: what they do with a mixed step is not known."""
        return self._cache.missing

    def _run(self) -> None:
        """Compute steps until the batch is closed."""
        try:
            with torch.inference_mode():
                while not self._closing.is_set():
                    self._take_commands(wait=not (self._scheduler.running or self._scheduler.waiting))
                    step = self._scheduler.plan()
                    if step:
                        self._cache.clear(self._scheduler.unsure)
                        self._scheduler.unsure.clear()
                        self._threads.settle()
                        self._step(step)
                    else:
                        self._deliver()
        except BaseException as error:
            logger.exception("the running batch has ended")
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            reason = self.failure or "the engine was closed"
            for job in [*self._jobs.values(), *self._left_in_queue()]:
                self._tell(job, finished=True, error=reason)
            self._deliver()

    def _left_in_queue(self) -> Iterator[Job]:
        """Jobs that came too late for a step; after the batch's end no more come."""
        with self._entry:
            while not self._commands.empty():
                command = self._commands.get()
                if isinstance(command, Job):
                    yield command

    def _take_commands(self, *, wait: bool) -> None:
        while True:
            if wait:
                self._deliver()
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if not self._open.is_set():
                self._deliver()
                self._open.wait()  # what belongs together is in the queue then
            if callable(command):
                command()
                wait = not (self._scheduler.running or self._scheduler.waiting)
            elif isinstance(command, Job) and command.id in self._jobs:
                self._tell(command, finished=True, error=f"a request {command.id!r} is in the batch already")
            elif isinstance(command, Job):
                self._jobs[command.id] = command
                self._scheduler.waiting.append(command)
            elif command is not None and (job := self._jobs.get(command)) is not None:
                self._end(job, None)

    def _step(self, step: Sequence[tuple[Job, Piece]]) -> None:
        """Compute one step and give every request its next token."""
        self.steps += 1
        self.sizes[len(step)] += 1
        began = time.perf_counter()
        try:
            logits = self._forward(step)
        except Exception as error:  # noqa: BLE001  whatever the model raises
            self._without_culprits(step, error)
            return
        self._deliver()
        if self.device.type == "cuda":
            # Only now it took what it took, and a slot whose last request is cancelled next may be overwritten.
            torch.cuda.current_stream(self.device).synchronize()
        self._scheduler.done(step, time.perf_counter() - began)
        logits = self._score_prompts(step, logits)
        whole = [job for job, piece in step if piece.past + piece.length == len(job.tokens)]
        ready = [job for job in whole if job.id in self._jobs]  # without those whose prompt could not be scored
        if not ready:
            return
        names = tuple(job.id for job in ready)
        if self.see is not None:
            self.see(names, logits)
        tokens, failed = self._sampler(logits, [job.state for job in ready]).read()
        for row, (job, token) in enumerate(zip(ready, tokens, strict=True)):
            if row in failed:
                self._end(job, failed[row])
                continue
            self._scheduler.know(job)
            if job.params.max_new_tokens:  # 0: only the prompt was scored
                job.tokens.append(token)
            if job.is_complete:
                self._end(job, None)
            else:
                self._tell(job)

    def _score_prompts(self, step: Sequence[tuple[Job, Piece]], logits: Tensor) -> Tensor:
        """Give prompts that want it their log probabilities; the rows of last tokens, which are sampled, are left.

        A prompt that cannot be scored, such as for want of memory, ends its request and no other.
        """
        if not any(job.state.scores_prompt for job, _ in step):
            return logits
        kept = [_rows_kept(job, piece) for job, piece in step]
        sampled: list[int] = []
        row = 0
        for (job, piece), count in zip(step, kept, strict=True):
            if job.state.scores_prompt:
                try:
                    job.state.score_prompt(piece.past, logits[row : row + count])
                except Exception as error:
                    logger.exception("a prompt cannot be scored")
                    self._end(job, f"its prompt cannot be scored ({type(error).__name__})")
            row += count
            if job.id in self._jobs and piece.past + piece.length == len(job.tokens):
                sampled.append(row - 1)
        return logits[torch.tensor(sampled, dtype=torch.int64, device=logits.device)]

    def _forward(self, step: Sequence[tuple[Job, Piece]]) -> Tensor:
        """[rows, vocabulary] logits of the last tokens of requests whose text is computed to its end.

        Of a prompt that is scored, those of all its tokens in the step.
        """
        if self._static is not None and not any(job.state.scores_prompt for job, _ in step):
            before, self._layout = self._layout, ()  # the buffers hold this step then, or a part of it
            if (found := self._static.run(step)) is not None:
                return found
            self._layout = before
        self._deliver()
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for job, piece in step:
            end = piece.past + piece.length
            ids += job.tokens[piece.past : end]
            positions += range(piece.past, end)
            rows += range(len(ids) - _rows_kept(job, piece), len(ids))
        rows = rows or [0]  # a model may not take a step without a row of logits
        wanted = torch.tensor(rows, device=self.device)
        lengths, pieces = [piece.length for _, piece in step], [piece for _, piece in step]
        slots = [job.slot for job, _ in step]
        layout = lengths, slots, rows
        if layout != self._layout:  # of most steps it is that of the step before
            self._layout = ()  # if building fails, whose rows are where is not known, and the next step builds anew
            kept = rows if self._cuts_rows else None
            self._context = StepContext.build(lengths, slots, kept, self.device, self._switch.buffers)
            self._layout = layout
        self._switch.step = self._context
        cut = {"logits_to_keep": wanted} if self._cuts_rows else {}
        places = StepPlaces(self._cache, pieces, self.device)
        with running(places):
            output = self._model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                use_cache=False,
                paged=places,  # says to `survey` that attention is no module of rows
                **cut,
            )
        logits = output.logits[0]
        return logits if self._cuts_rows else logits[wanted]

    def _without_culprits(self, step: Sequence[tuple[Job, Piece]], error: Exception) -> None:
        """Fail the requests whose tokens cannot be computed: each is tried alone, and the others go on."""
        if len(step) > 1:
            _let_go(error)
            for job, piece in step:
                self._step([(job, piece)])
            return
        logger.error("a step of the running batch failed", exc_info=error)
        _let_go(error)
        job, _ = step[0]
        self._run_base(job.pages[-1])
        self._end(job, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)

    def _run_base(self, page: int) -> None:
        """Compute one token of the base: what that raises, every step would raise, and the batch ends.

        Args:
            page: that nobody else reads; the last one of a job is not full, so it is its own.
        """
        probe = Job("probe", [0], BASE_SLOT, "", SamplingParams(), frozenset(), lambda *told: None)
        static, self._static = self._static, None  # where only those steps fail, the others can go on
        try:
            self._forward([(probe, Piece(1, 0, [page]))])
        finally:
            self._static = static

    def _end(self, job: Job, error: str | None) -> None:
        self._scheduler.remove(job, failed=error is not None)
        del self._jobs[job.id]
        self._tell(job, finished=True, error=error)

    def _tell(self, job: Job, *, finished: bool = False, error: str | None = None) -> None:
        told = job.id, job.listener, job.made, finished, error
        if self.device.type == "cpu":  # a thread that wakes up for each token would only take time from the steps
            tell(*told)
        else:
            self._held.append(told)

    def _deliver(self) -> None:
        """Let the other thread tell what there is to tell.

        That thread needs Python as the computing one does, so it gets to work when the next graph is on the device.
        """
        for told in self._held:
            self._told.put(told)
        self._held.clear()

    def _tell_forever(self) -> None:
        while (told := self._told.get()) is not None:
            tell(*told)


def _let_go(error: BaseException | None) -> None:
    """Free what a failed step had computed, which its traceback holds: what is tried next may need the memory."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _rows_kept(job: Job, piece: Piece) -> int:
    """How many rows of logits a piece of a request's text needs, from its end."""
    if job.state.scores_prompt:
        return piece.length
    return int(piece.past + piece.length == len(job.tokens))

"""Experts that take turns: for models that the running batch cannot run.

One expert's weights are in the model at a time, as `meswitch merge` would make them, and `generate` of transformers
answers that expert's requests in a batch. Every model that can be merged can be asked this way. It is slower than the
running batch: a request waits for the experts before it, and weights are made anew when another expert has its turn.
"""

import contextlib
import logging
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from meswitch.cpu import StepThreads
from meswitch.engine.context import BASE_SLOT
from meswitch.engine.parameters import StoredTensors
from meswitch.engine.proof import Trial
from meswitch.engine.request import Listener, stopped, tell
from meswitch.engine.sampling import SamplingParams, SamplingState, StepSampler, not_finite
from meswitch.errors import IncompatibleError
from meswitch.slots import ExpertStore
from meswitch.threads import wait_for_end

logger = logging.getLogger("meswitch.engine")

# New tokens after which a turn ends if another expert's requests wait.
SLICE = 128
MAX_BATCH = 16
_TRIED = (29, 11)  # tokens of two prompts
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_CLOSE = 0.001  # of the largest logit: how far padding may move any


@dataclass(eq=False)
class _Job:
    """A request: its prompt, what it got so far, and who is told."""

    id: str
    prompt: list[int]
    slot: int
    params: SamplingParams
    eos: frozenset[int]
    listener: Listener
    made: list[int] = field(default_factory=list)
    cancelled: bool = False
    error: str | None = None

    @property
    def left(self) -> int:
        return self.params.max_new_tokens - len(self.made)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.made

    @property
    def complete(self) -> bool:
        return self.left <= 0 or (bool(self.made) and self.made[-1] in self.eos)


class Turns:
    """Runs requests; each belongs to a slot of the expert store, or to the base.

    Args:
        model: the base, nothing wrapped.
        stored: what the experts store.
        store: holds the experts.
        kv_tokens: tokens of all requests of a turn together, at most.
        trial: what the base alone gives.

    Raises:
        IncompatibleError: `generate` of transformers cannot run the base, or gives something else.
    """

    merged_budget = 0  # one expert's, as it has its turn
    kv_used_tokens = 0
    kv_bytes = 0  # keys and values are made and dropped by every turn

    def __init__(self, model: Any, stored: StoredTensors, store: ExpertStore, trial: Trial, *, kv_tokens: int) -> None:
        self.kv_tokens = kv_tokens
        self.failure: str | None = None
        self.steps = 0
        """Tokens of a turn's requests that were made, and turns that were taken."""
        self.sizes: Counter[int] = Counter()
        """Requests of a turn -> turns."""
        self._model, self._stored, self._store = model, stored, store
        self._device = next(model.parameters()).device
        self._threads = StepThreads(self._device, model.config.get_text_config().hidden_size)
        self._parameters = stored.of_module("", lambda name: name)
        self._kept: dict[str, Tensor] = {}  # of the base, while an expert's are in their place
        self._expert = BASE_SLOT
        self._sampler = StepSampler(model.dtype, self._fail)
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._prove(trial)
        self._pads_up_to = (longest_unturned(model.config) or math.inf) if self._padding_is_harmless() else 0
        self._thread = threading.Thread(target=self._run, name="meswitch-turns", daemon=True)
        self._thread.start()

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
        """Start a request. The listener is called from the engine's thread, with all new tokens so far each time.

        owner: not needed here, as no keys and values outlive a turn.
        sampling: what chooses its tokens; made of `params` if it is not given.
        """
        with self._changed:
            if self._closed or self.failure is not None:
                raise stopped(self.failure)
            self._jobs[request] = _Job(request, tokens, slot, params, frozenset(eos), listener)
            state = sampling or SamplingState(params, tokens, frozenset(eos))
            self._sampler.states[request] = state
            self._changed.notify_all()

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is needed for requests to start in one turn."""
        return contextlib.nullcontext()

    def cancel(self, request: str) -> None:
        """End a request early. Its listener is told `finished` once no step can touch it any more."""
        with self._changed:
            job = self._jobs.get(request)
            if job is not None:
                job.cancelled = True
            self._changed.notify_all()

    def close(self) -> None:
        """End after the tokens that are being computed. The log says if that takes long, or does not end at all."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        wait_for_end(self._thread, "computes")

    @property
    def graph_bytes(self) -> int:
        """None: steps are not recorded."""
        return 0

    @property
    def threads(self) -> dict[str, threading.Thread]:
        """What each thread does -> the thread. None of them ends before this is closed."""
        return {"computes": self._thread}

    @property
    def merged_bytes(self) -> int:
        """Device memory of the base's own tensors that an expert's stand in for now."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def _run(self) -> None:
        """Take turns until the engine is closed."""
        try:
            self._take_turns()
        except BaseException as error:
            logger.exception("the thread that takes turns has ended")
            with self._changed:
                self.failure = f"{type(error).__name__}: {error}"
        finally:
            for job in list(self._jobs.values()):
                self._finish(job, self.failure or "the engine was closed")

    def _take_turns(self) -> None:
        while True:
            self._threads.settle()
            with self._changed:
                while not self._closed and not self._jobs:
                    self._changed.wait()
                if self._closed:
                    return
                gone = [job for job in self._jobs.values() if job.cancelled]
                turn = self._next_turn()
            for job in gone:
                self._finish(job, job.error)
            if turn:
                self._take_turn(turn)

    def _next_turn(self) -> list[_Job]:
        """Requests of the expert that waits longest, as many as go into a batch."""
        waiting = [job for job in self._jobs.values() if not job.cancelled]
        if not waiting:
            return []
        first = waiting[0]
        chosen: list[_Job] = []
        longest = 0
        for job in waiting:
            longest_then = max(longest, len(job.tokens) + job.left)
            fits = longest_then <= self._pads_up_to or all(len(job.tokens) == len(one.tokens) for one in chosen)
            if (
                job.slot == first.slot
                and fits
                and len(chosen) < MAX_BATCH
                and longest_then * (len(chosen) + 1) <= max(self.kv_tokens, longest_then)
            ):
                chosen.append(job)
                longest = longest_then
        return chosen

    def _take_turn(self, turn: list[_Job]) -> None:
        self.steps += 1
        self.sizes[len(turn)] += 1
        try:
            self._become(turn[0].slot)
            answered = self._score_prompts(turn)
            if answered:
                self._generate(answered)
        except Exception as error:  # noqa: BLE001  whatever a model raises fails these requests alone
            if len(turn) > 1:  # one of them may be the cause: each alone
                for job in turn:
                    if not self._ended(job):
                        self._take_turn([job])
                return
            self._finish(turn[0], f"{type(error).__name__}: {error}")
            return
        for job in turn:
            if not self._ended(job):  # its turn is over: it waits behind the others
                with self._changed:
                    if job.id in self._jobs:
                        self._jobs.move_to_end(job.id)

    def _ended(self, job: _Job) -> bool:
        """Whether a job needs no more steps; it is told so then."""
        if not (job.cancelled or job.complete):
            return False
        self._finish(job, job.error)
        return True

    def _fail(self, request: str, error: str) -> None:
        """End a request whose step went wrong. The rows of complete ones are computed on, and do not count."""
        job = self._jobs.get(request)
        if job is not None and not job.complete:
            job.error, job.cancelled = error, True

    def _finish(self, job: _Job, error: str | None) -> None:
        with self._changed:
            if self._jobs.pop(job.id, None) is None:
                return
            self._sampler.states.pop(job.id, None)
        self._tell(job, finished=True, error=error)

    def _tell(self, job: _Job, *, finished: bool = False, error: str | None = None) -> None:
        tell(job.id, job.listener, list(job.made), finished, error)

    def _others_wait(self, slot: int) -> bool:
        return any(job.slot != slot and not job.cancelled for job in list(self._jobs.values()))

    @torch.no_grad()
    def _become(self, slot: int) -> None:
        """Put an expert's weights in the place of those that are there."""
        if slot == self._expert == BASE_SLOT and not self._kept:  # an exchange may have failed half-way
            return
        self._restore()
        if slot == BASE_SLOT:
            return
        own = self._parameters.own(self._model, self._store.tensors(slot))
        for name, value in own.items():
            self._kept[name] = _exchange(self._model, name, value)
        for target, source in self._stored.architecture.tied.items():
            # the base's head is its embedding; so is the head of an expert that does not say otherwise
            if source in own and target not in own:
                self._kept[target] = _exchange(self._model, target, own[source])
        self._expert = slot

    @torch.no_grad()
    def _restore(self) -> None:
        for name, value in self._kept.items():
            _exchange(self._model, name, value)
        self._kept, self._expert = {}, BASE_SLOT

    @torch.inference_mode()
    def _score_prompts(self, turn: list[_Job]) -> list[_Job]:
        """Give prompts that want it their log probabilities; requests that want more than that are left."""
        for job in turn:
            state = self._sampler.states[job.id]
            if state.scores_prompt:
                ids = torch.tensor([job.prompt], device=self._device)
                logits = self._model(input_ids=ids, use_cache=False).logits[0]
                state.score_prompt(0, logits)
                if state.is_damaged:
                    job.error, job.cancelled = not_finite(self._model.dtype), True
        return [job for job in turn if not (job.cancelled or job.complete)]

    @torch.inference_mode()
    def _generate(self, turn: list[_Job]) -> None:
        width = max(len(job.tokens) for job in turn)
        ids = torch.tensor([[0] * (width - len(job.tokens)) + job.tokens for job in turn], device=self._device)
        mask = torch.tensor([[0] * (width - len(job.tokens)) + [1] * len(job.tokens) for job in turn])
        self._sampler.rows = tuple(job.id for job in turn)
        self._model.generate(
            input_ids=ids,
            attention_mask=mask.to(self._device),
            generation_config=_settings(max(job.left for job in turn)),
            logits_processor=LogitsProcessorList([self._sampler]),
            stopping_criteria=StoppingCriteriaList([_Listening(self, turn, width)]),
        )

    @torch.inference_mode()
    def _prove(self, trial: Trial) -> None:
        """See that `generate`, with its cache, gives what the model alone gives."""
        prompt = torch.tensor([trial.prompts[0]])
        who = type(self._model).__name__
        try:
            found = self._logits(prompt, torch.ones_like(prompt))[0].chunk(2)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
            raise IncompatibleError(f"{who}: `generate` of transformers cannot run it: {reason}") from error
        fault = trial.fault(found)
        if fault is not None:
            raise IncompatibleError(f"{who}: with `generate` of transformers {fault}")

    @torch.inference_mode()
    def _padding_is_harmless(self) -> bool:
        """Whether requests of different lengths can be answered in one batch: known of softmax attention, and tried.

        What a recurrent layer or one that compresses its keys makes of padding may show with other lengths only.
        """
        generator = torch.Generator().manual_seed(0)
        size = self._model.get_input_embeddings().weight.shape[0]
        long, short = (torch.randint(size, (1, n), generator=generator) for n in _TRIED)
        kinds = set(getattr(self._model.config.get_text_config(), "layer_types", None) or ())
        if self._model._is_stateful or not kinds <= _ATTENTION:
            return False
        padding = _TRIED[0] - _TRIED[1]
        mask = torch.ones(2, _TRIED[0], dtype=torch.int64)
        mask[1, :padding] = 0
        with contextlib.suppress(Exception):
            wanted = self._logits(short, torch.ones_like(short))[0]
            found = self._logits(torch.cat([long, nn.functional.pad(short, (padding, 0))]), mask)[1]
            finite = wanted.isfinite()
            moved = (found - wanted)[finite].abs().max()
            return bool(moved <= _CLOSE * wanted[finite].abs().max())
        return False

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of two new tokens, the second from the cache of the first: [rows, 2 x vocabulary]."""
        out = self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=_settings(2, output_logits=True, return_dict_in_generate=True),
        )
        return torch.cat([logits.float() for logits in out.logits], -1)


class _Listening(StoppingCriteria):
    """After each step: tell who waits, and say which rows are done."""

    def __init__(self, turns: Turns, turn: list[_Job], width: int) -> None:
        self._turns, self._turn, self._width = turns, turn, width
        self._before = [len(job.made) for job in turn]
        self._done = [False] * len(turn)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        step = input_ids.shape[1] - self._width
        self._turns.steps += 1
        ends = self._turns._closed or (step >= SLICE and self._turns._others_wait(self._turn[0].slot))
        for row, (job, token) in enumerate(zip(self._turn, input_ids[:, -1].tolist(), strict=True)):
            if self._done[row]:
                continue
            job.made.append(token)
            finished = job.complete
            self._done[row] = finished or job.cancelled or ends
            if not finished and not job.cancelled:
                self._turns._tell(job)
        return torch.tensor(self._done, device=input_ids.device)


def _settings(tokens: int, **more: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0, **more)


def _exchange(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Put a tensor in the place of a parameter or buffer; gives what was there."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path) if path else model
    table: Mapping[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    before = table[leaf]
    keeps = isinstance(value, nn.Parameter) or leaf in module._buffers
    table[leaf] = value if keeps else nn.Parameter(value, requires_grad=False)  # type: ignore[index]
    assert isinstance(before, Tensor)
    return before


def longest_unturned(config: Any) -> int | None:
    """Tokens of a text up to which the rotary embedding is that of short texts; None if it is the same for all.

    `longrope` (Phi-3, Phi-4) has two sets of frequencies and takes one of them for everything that is computed
    together: the long one as soon as a single text is longer than those of pretraining. A short text beside a long one,
    and the part of a long text that was computed while it was short, would come out otherwise than alone.

    Args:
        config: of a model, a `transformers.PreTrainedConfig`.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    limits = [
        int(kind["original_max_position_embeddings"])
        for kind in kinds
        if kind.get("rope_type") == "longrope" and kind.get("short_factor") != kind.get("long_factor")
    ]
    return min(limits, default=None)

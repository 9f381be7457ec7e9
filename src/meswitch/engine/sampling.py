"""Choosing the next token of every request of a step, each by its own parameters, in one operation on the device.

`Sampler` takes the logits of a step and a `SamplingState` for each of its rows. What it gives, `Sampled`, stays on the
device until it is read; nothing before that waits for the device. A step of plain greedy rows costs one maximum.

A row's token depends on its own logits and its own state, never on the other rows: random numbers are the request's
own, and whatever is computed for one row is computed alike alone and among others.
"""

import logging
import math
import random
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from meswitch.engine.grammar import Grammar
from meswitch.engine.scores import (
    IN_PROMPT,
    TokenLogprobs,
    TokenScores,
    allow,
    draw,
    floats,
    ints,
    moved,
    penalise,
    token_logprobs,
)
from meswitch.errors import ConfigError

logger = logging.getLogger("meswitch.engine")

MAX_STOPS, MAX_STOP = 64, 1024  # texts, and characters of each
MAX_LOGPROBS = 20  # alternatives to a token, as OpenAI has it
MAX_BIASED = 1024  # tokens of a `logit_bias`
MAX_STOP_TOKENS = 256
SEEDS = -(2**63), 2**64 - 1
_LIMITS = {
    "stop": f"; up to {MAX_STOPS} texts of 1 to {MAX_STOP} characters",
    "logprobs": f"; 0 to {MAX_LOGPROBS}",
    "prompt_logprobs": f"; 0 to {MAX_LOGPROBS}",
    "logit_bias": f"; up to {MAX_BIASED} token ids, each with a number from -100 to 100",
    "stop_token_ids": f"; up to {MAX_STOP_TOKENS} token ids",
    "min_new_tokens": "; 0 to max_new_tokens",
}
_COLDEST = 1e-20  # in float32, differences of logits by this much are as good as infinite, and none overflows to NaN
NOT_FINITE, NOTHING_LEFT, FAILED = -1, -2, -3
"""In the place of a token: its logits are not numbers; its parameters leave none; its state cannot be read."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is continued.

    Args:
        max_new_tokens: the longest answer, in tokens. 0 makes none: the prompt is scored, see `prompt_logprobs`.
        temperature: 0 is greedy; any other finite value samples.
        top_p: sample from the likeliest tokens that make up this share of what `top_k` keeps; 1.0 keeps all.
        top_k: sample from so many tokens; 0 keeps all.
        min_p: sample from tokens that are at least this many times as likely as the likeliest; 0 keeps all.
        seed: makes the request repeatable whatever shares its batch.
        stop: texts that end the answer and are not part of it, up to `MAX_STOPS` of up to `MAX_STOP` characters. A
            special token's text, such as `<|end|>`, stands for that token too.
        stop_token_ids: tokens that end the answer beside the expert's own ends.
        ignore_eos: whether the expert's own end tokens do not end the answer.
        min_new_tokens: before so many tokens nothing ends the answer.
        repetition_penalty: divides the positive logits of tokens that were in prompt or answer, and multiplies the
            negative ones; 1.0 is none.
        presence_penalty: is taken from the logits of tokens that were in the answer.
        frequency_penalty: the same, once for each time.
        logit_bias: token id -> what is added to its logit, -100 to 100.
        logprobs: give each token's log probability, and those of so many alternatives; None for neither. They are the
            model's own, before all of the above.
        prompt_logprobs: the same for the prompt's tokens.
        grammar: what the answer's text must be.
        shown: texts of special tokens that are part of the answer's text; others leave no trace in it.

    Raises:
        ConfigError: a value is out of range or of another type; the error names the field.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    shown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str | list):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if isinstance(self.stop_token_ids, list):
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        ranges = {
            "max_new_tokens": _is_whole(self.max_new_tokens) and self.max_new_tokens >= 0,
            "temperature": _is_number(self.temperature) and 0 <= self.temperature < math.inf,
            "top_p": _is_number(self.top_p) and 0 < self.top_p <= 1,
            "top_k": _is_whole(self.top_k) and self.top_k >= 0,
            "min_p": _is_number(self.min_p) and 0 <= self.min_p <= 1,
            "seed": self.seed is None or (_is_whole(self.seed) and SEEDS[0] <= self.seed <= SEEDS[1]),
            "stop": isinstance(self.stop, tuple)
            and len(self.stop) <= MAX_STOPS
            and all(isinstance(text, str) and 0 < len(text) <= MAX_STOP for text in self.stop),
            "stop_token_ids": isinstance(self.stop_token_ids, tuple)
            and len(self.stop_token_ids) <= MAX_STOP_TOKENS
            and all(_is_whole(token) and token >= 0 for token in self.stop_token_ids),
            "ignore_eos": isinstance(self.ignore_eos, bool),
            "min_new_tokens": _is_whole(self.min_new_tokens) and 0 <= self.min_new_tokens <= self.max_new_tokens,
            "repetition_penalty": _is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf,
            "presence_penalty": _is_number(self.presence_penalty) and abs(self.presence_penalty) < math.inf,
            "frequency_penalty": _is_number(self.frequency_penalty) and abs(self.frequency_penalty) < math.inf,
            "logit_bias": isinstance(self.logit_bias, Mapping)
            and len(self.logit_bias) <= MAX_BIASED
            and all(_is_whole(t) and t >= 0 and _is_number(v) and -100 <= v <= 100 for t, v in self.logit_bias.items()),
            "logprobs": self.logprobs is None or (_is_whole(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
            "prompt_logprobs": self.prompt_logprobs is None
            or (_is_whole(self.prompt_logprobs) and 0 <= self.prompt_logprobs <= MAX_LOGPROBS),
            "grammar": self.grammar is None or isinstance(self.grammar, Grammar),
            "shown": isinstance(self.shown, tuple) and all(isinstance(text, str) and text for text in self.shown),
        }
        for name, fits in ranges.items():
            if not fits:
                given = reprlib.repr(getattr(self, name))
                raise ConfigError(f"{name}: {given} is out of range{_LIMITS.get(name, '')}")

    def check_tokens(self, vocabulary: int) -> None:
        """See that the token ids that it names are there.

        Args:
            vocabulary: token ids of the expert are smaller.

        Raises:
            ConfigError: one is not.
        """
        for name, tokens in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in tokens:
                if token >= vocabulary:
                    raise ConfigError(f"{name}: there is no token {token}; ids lie between 0 and {vocabulary - 1}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Matcher(Protocol):
    """Follows one answer through its grammar. What it raises ends its request."""

    def fill(self, mask: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Write which tokens may come next. mask: [vocabulary / 32, rounded up], a bit a token, lowest first."""
        ...

    def accept(self, token: int) -> None:
        """Take the next token."""
        ...


class SamplingState:
    """What sampling keeps of one request from step to step.

    Args:
        params: of the request.
        prompt: its token ids.
        ends: tokens that end the answer.
        matcher: of the grammar, if there is one.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        ends: frozenset[int] = frozenset(),
        matcher: Matcher | None = None,
    ) -> None:
        self.params, self.prompt, self.ends, self.matcher = params, prompt, ends, matcher
        self.made = 0
        self.logprobs: list[TokenLogprobs] = []
        """Of the answer's tokens, if they are wanted. Other threads may read it; it only grows."""
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        """Of the prompt's tokens so far, if they are wanted; the first has none."""
        self.is_damaged = False
        """Whether the prompt's log probabilities are no numbers."""
        # Python's own generator takes whole numbers of any size, and makes no difference between n and -n.
        self._random = random.Random(None if params.seed is None else params.seed % 2**64)
        self.uniform = self._random.random()
        """The random number, 0 to 1, that chooses the next token."""
        self.history: Tensor | None = None  # [vocabulary] int32, see `IN_PROMPT`
        self.penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        self.is_plain = (
            not (params.temperature or self.penalised or params.logit_bias or params.min_new_tokens)
            and params.logprobs is None
            and matcher is None
        )
        """Whether the likeliest token is all that is wanted."""

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of the prompt are wanted and not all there."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt)

    def score_prompt(self, first: int, logits: Tensor) -> None:
        """Take the log probabilities of a part of the prompt. Waits for the device.

        Args:
            first: place in the prompt that the first row was computed at; a row says what comes after its place.
            logits: [rows, vocabulary].
        """
        if not self.prompt_logprobs:
            self.prompt_logprobs.append(None)
        start = len(self.prompt_logprobs)  # a text that is computed again after it lost its pages is scored once
        tokens = list(self.prompt[start : first + len(logits) + 1])
        if tokens:
            rows = logits[start - 1 - first :][: len(tokens)]
            found = token_logprobs(rows, tokens, self.params.prompt_logprobs or 0)
            self.is_damaged |= any(math.isnan(one.logprob) for one in found)
            self.prompt_logprobs += found

    def took(self, token: int) -> None:
        """Take the token that was chosen.

        Raises:
            Exception: whatever the grammar raises; the request cannot go on.
        """
        self.made += 1
        self.uniform = self._random.random()
        if self.matcher is not None:
            self.matcher.accept(token)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A step's tokens, on the device.

    Args:
        tokens: [rows] int64; a negative one says why there is none, see `NOT_FINITE`.
        states: of the rows.
        scored: rows whose log probabilities are wanted, with these.
        explain: why a row has no token, by the negative number.
    """

    tokens: Tensor
    states: Sequence[SamplingState]
    explain: Mapping[int, str]
    scored: "tuple[list[int], TokenScores] | None" = None

    def read(self) -> tuple[list[int], dict[int, str]]:
        """Wait for the device, and let the requests go on by their tokens.

        Returns:
            The tokens, and row -> why its request cannot go on.
        """
        tokens = self.tokens.tolist()
        failed = {row: self.explain[token] for row, token in enumerate(tokens) if token < 0}
        failed |= {row: self.explain[NOT_FINITE] for row, state in enumerate(self.states) if state.is_damaged}
        if self.scored is not None:
            rows, scores = self.scored
            counts = [self.states[row].params.logprobs or 0 for row in rows]
            for row, found in zip(rows, scores.read([tokens[row] for row in rows], counts), strict=True):
                if row not in failed:
                    self.states[row].logprobs.append(found)
        for row, (state, token) in enumerate(zip(self.states, tokens, strict=True)):
            if row in failed:
                continue
            try:
                state.took(token)
            except Exception as error:
                logger.exception("a token that was made cannot be taken")
                failed[row] = f"its grammar cannot go on ({type(error).__name__}: {error})"
        return tokens, failed


class Sampler:
    """Chooses tokens, for all rows of a step at once.

    Args:
        dtype: that the model computes in, for messages.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._explain = {
            NOT_FINITE: not_finite(dtype),
            NOTHING_LEFT: "its parameters (grammar, logit_bias, min_tokens) leave no token",
            FAILED: "its next token cannot be chosen; the server's log says why",
        }
        self._table: _Table | None = None
        self._histories: tuple[list[SamplingState], Tensor] | None = None

    def __call__(self, logits: Tensor, states: Sequence[SamplingState]) -> Sampled:
        """Choose a token for each row.

        Args:
            logits: [rows, vocabulary] of any dtype, on any device; not changed. -inf for tokens that are not there.
            states: of the rows' requests.
        """
        best, tokens = logits.max(-1)  # NaN counts as the largest
        tokens = torch.where(best.isfinite(), tokens, NOT_FINITE)
        rows = [row for row, state in enumerate(states) if not state.is_plain]
        if not rows:
            return Sampled(tokens, states, self._explain)
        device = logits.device
        try:
            tokens = self._among(logits, [states[row] for row in rows], rows, tokens)
        except Exception:
            if len(rows) > 1:  # one of them may be the cause: each alone
                for row in rows:
                    found = self(logits[row : row + 1], [states[row]]).tokens
                    tokens = tokens.index_copy(0, ints([row], device), found)
            else:
                logger.exception("a token cannot be chosen")
                tokens = tokens.index_fill(0, ints(rows, device), FAILED)
        wanted = [row for row in rows if states[row].params.logprobs is not None]
        if not wanted:
            return Sampled(tokens, states, self._explain)
        index = ints(wanted, device)
        top = max(states[row].params.logprobs or 0 for row in wanted)
        try:
            scores = TokenScores.of(_rows(logits, wanted, index), tokens[index].clamp(min=0), top)
        except Exception:  # such as too little memory: rows that want none go on
            logger.exception("log probabilities cannot be computed")
            return Sampled(tokens.index_fill(0, index, FAILED), states, self._explain)
        return Sampled(tokens, states, self._explain, (wanted, scores))

    def _among(self, logits: Tensor, states: list[SamplingState], rows: list[int], tokens: Tensor) -> Tensor:
        """Tokens with those of some rows replaced, by the parameters of their requests."""
        device = logits.device
        if self._table is None or not self._table.is_of(states, device):
            self._table = _Table(states, device)
        table = self._table
        index = ints(rows, device)
        scores = _rows(logits, rows, index).float()
        if scores.data_ptr() == logits.data_ptr():
            scores = scores.clone()
        if table.biased is not None:
            row, token, bias = table.biased
            scores.index_put_((row, token), bias, accumulate=True)
        history = None
        if table.penalised:
            history = self._history([states[i] for i in table.penalised], scores)
            penalise(scores, history, table.penalised_index, table.penalties)
        young = [(i, token) for i, s in enumerate(states) if s.made < s.params.min_new_tokens for token in s.ends]
        if young:
            at = ints(young, device)
            scores.index_put_((at[:, 0], at[:, 1]), torch.full((), -torch.inf, device=device))
        failed = _allow(scores, states)
        chosen = scores.argmax(-1)
        if table.samples:
            uniform = floats([state.uniform for state in states], device)
            drawn = draw(scores, uniform, table.temperature, table.limits, table.min_p)
            chosen = torch.where(table.temperature > 0, drawn, chosen)
        chosen = torch.where(scores.amax(-1) == -torch.inf, NOTHING_LEFT, chosen)
        if failed:
            chosen = chosen.index_fill(0, ints(failed, device), FAILED)
        chosen = torch.where(tokens[index] < 0, tokens[index], chosen)
        if history is not None:
            made = chosen[table.penalised_index].clamp(min=0)[:, None]
            history.scatter_add_(1, made, torch.ones_like(made, dtype=history.dtype))
        return tokens.index_copy(0, index, chosen)

    def _history(self, states: list[SamplingState], like: Tensor) -> Tensor:
        """[states, vocabulary] int32: how often each token was made, and whether it is in the prompt.

        The states' own histories become rows of it: of most steps the table of the step before is used again.
        """
        if self._histories is not None and _same(self._histories[0], states):
            return self._histories[1]
        for state in states:
            if state.history is None:
                state.history = torch.zeros(like.shape[1], dtype=torch.int32, device=like.device)
                if state.params.repetition_penalty != 1:
                    state.history.index_fill_(0, ints(sorted(set(state.prompt)), like.device), IN_PROMPT)
        table = torch.stack([state.history for state in states if state.history is not None])
        for state, row in zip(states, table.unbind(0), strict=True):
            state.history = row
        self._histories = states, table
        return table


class _Table:
    """The parameters of some rows on a device, kept while the rows stay the same."""

    def __init__(self, states: list[SamplingState], device: torch.device) -> None:
        self._states, self._device = states, device
        params = [state.params for state in states]
        self.penalised = [i for i, state in enumerate(states) if state.penalised]
        self.penalised_index = ints(self.penalised, device)
        self.samples = any(p.temperature > 0 for p in params)
        columns = floats(
            [
                (
                    max(p.temperature, _COLDEST) if p.temperature else 0.0,
                    p.top_p,
                    min(p.top_k or 1 << 31, 1 << 31),
                    p.min_p,
                    p.repetition_penalty,
                    p.presence_penalty,
                    p.frequency_penalty,
                )
                for p in params
            ],
            device,
        )
        self.temperature, top_p, top_k, min_p = columns[:, :4].unbind(1)
        self.limits = (top_k, top_p) if any(p.top_k > 0 or p.top_p < 1 for p in params) else None
        self.min_p = min_p if any(p.min_p > 0 for p in params) else None
        self.penalties = columns[self.penalised_index, 4:].float().unbind(1)
        biased = [(i, token, value) for i, p in enumerate(params) for token, value in p.logit_bias.items()]
        self.biased: tuple[Tensor, Tensor, Tensor] | None = None
        if biased:
            at, values = ints([(i, token) for i, token, _ in biased], device), floats([v for *_, v in biased], device)
            self.biased = at[:, 0], at[:, 1], values.float()

    def is_of(self, states: list[SamplingState], device: torch.device) -> bool:
        return device == self._device and _same(states, self._states)


def _same(first: Sequence[SamplingState], second: Sequence[SamplingState]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _allow(scores: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """Leave the tokens that the rows' grammars allow. scores: [rows, vocabulary]. Gives rows whose grammar fails."""
    bound = [i for i, state in enumerate(states) if state.matcher is not None]
    if not bound:
        return []
    failed = []
    masks = np.zeros((len(bound), (scores.shape[1] + 31) // 32), dtype=np.int32)
    for mask, i in zip(masks, bound, strict=True):
        matcher = states[i].matcher
        assert matcher is not None
        try:
            matcher.fill(mask)
        except Exception:
            logger.exception("what a grammar allows is not known")
            failed.append(i)
    allow(scores, ints(bound, scores.device), moved(torch.from_numpy(masks), scores.device))
    return failed


def _rows(logits: Tensor, rows: Sequence[int], index: Tensor) -> Tensor:
    return logits if len(rows) == len(logits) else logits[index]


def not_finite(dtype: torch.dtype) -> str:
    """Why a request ends whose hidden states or logits are NaN or infinite."""
    name = str(dtype).removeprefix("torch.")
    return f"its numbers are not finite: its weights are damaged, or they overflow in {name}"


Fail = Callable[[str, str], None]


class StepSampler:
    """A logits processor for `generate` of transformers: leaves each row one candidate, which argmax takes.

    `rows` and `states` are filled before each turn. A row from which no token can be chosen fails its request, and no
    other.

    Args:
        dtype: that the model computes in, for messages.
        fail: is told a request's id and why it cannot go on.
    """

    def __init__(self, dtype: torch.dtype, fail: Fail) -> None:
        self.rows: tuple[str, ...] = ()
        self.states: dict[str, SamplingState] = {}
        self._sampler = Sampler(dtype)
        self._fail = fail

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose a token for each row.

        Args:
            input_ids: [rows, length] token ids; not used.
            scores: [rows, vocabulary] logits, changed in place.
        """
        tokens, failed = self._sampler(scores, [self.states[request] for request in self.rows]).read()
        for row, reason in failed.items():
            self._fail(self.rows[row], reason)
        chosen = ints(tokens, scores.device).clamp(min=0)[:, None]  # what a failed row gets is thrown away
        return scores.fill_(-torch.inf).scatter_(1, chosen, 0.0)

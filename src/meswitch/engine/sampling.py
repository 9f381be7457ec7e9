"""Choosing the next token of every request in a batch, each by its own parameters."""

import logging
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.errors import ConfigError

logger = logging.getLogger("meswitch.engine")

MAX_STOPS, MAX_STOP = 64, 1024  # texts, and characters of each
_LIMITS = {"stop": f"; up to {MAX_STOPS} texts of 1 to {MAX_STOP} characters"}
SEEDS = -(2**63), 2**64 - 1  # what torch's generators take


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is continued.

    Args:
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 is greedy; any other finite value samples.
        top_p: sample from the likeliest tokens that make up this share; 1.0 keeps all.
        top_k: sample from so many tokens; 0 keeps all.
        seed: makes the request repeatable whatever shares its batch.
        stop: texts that end the answer and are not part of it, up to `MAX_STOPS` of up to `MAX_STOP` characters. A
            special token's text, such as `<|end|>`, stands for that token too.

    Raises:
        ConfigError: a value is out of range or of another type; the error names the field.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str | list):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        ranges = {
            "max_new_tokens": _is_whole(self.max_new_tokens) and self.max_new_tokens >= 1,
            "temperature": _is_number(self.temperature) and 0 <= self.temperature < math.inf,
            "top_p": _is_number(self.top_p) and 0 < self.top_p <= 1,
            "top_k": _is_whole(self.top_k) and self.top_k >= 0,
            "seed": self.seed is None or (_is_whole(self.seed) and SEEDS[0] <= self.seed <= SEEDS[1]),
            "stop": isinstance(self.stop, tuple)
            and len(self.stop) <= MAX_STOPS
            and all(isinstance(text, str) and 0 < len(text) <= MAX_STOP for text in self.stop),
        }
        for field, fits in ranges.items():
            if not fits:
                given = reprlib.repr(getattr(self, field))
                raise ConfigError(f"{field}: {given} is out of range{_LIMITS.get(field, '')}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Sampler:
    """One request's sampler. Its random numbers depend on its seed and its own tokens only."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def choose(self, logits: Tensor) -> int:
        """A token at random.

        Args:
            logits: [vocabulary] float32; the largest is finite.
        """
        params = self.params
        logits = logits.float().cpu()
        order = torch.argsort(logits, descending=True, stable=True)
        # In float64, and less than or equal to zero: no temperature above 0 is so small that this overflows.
        ranked = ((logits[order].double() - logits[order[0]].double()) / params.temperature).softmax(0)
        keep = torch.ones_like(ranked, dtype=torch.bool)
        if params.top_k:
            keep[min(params.top_k, len(keep)) :] = False
        keep &= ranked.cumsum(0) - ranked < params.top_p  # the token that crosses top_p stays
        return int(order[torch.multinomial(ranked * keep, 1, generator=self._generator)])


class StepSampler:
    """A logits processor: leaves each row one candidate, so that argmax takes it.

    Greedy rows pass untouched. `rows` and `samplers` are filled before the step. A row from which no token can be
    chosen fails its request, and no other.

    Args:
        dtype: that the model computes in, for messages.
        fail: is told a request's id and why it cannot go on.
    """

    def __init__(self, dtype: torch.dtype, fail: Callable[[str, str], None]) -> None:
        self.rows: tuple[str, ...] = ()
        self.samplers: dict[str, Sampler] = {}
        self._reason = not_finite(dtype)
        self._fail = fail

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Sample where a request wants it.

        Args:
            input_ids: [rows] last token ids; not used.
            scores: [rows, vocabulary] logits, changed in place.
        """
        finite = scores.amax(-1).isfinite().tolist()  # NaN counts as the largest
        for row, request in enumerate(self.rows):
            sampler = self.samplers.get(request)
            try:
                if not finite[row]:
                    self._fail(request, self._reason)
                    scores[row] = 0.0  # what is chosen is thrown away, but it must be a token
                elif sampler is not None:
                    token = sampler.choose(scores[row])
                    scores[row] = -torch.inf
                    scores[row, token] = 0.0
            except Exception as error:
                logger.exception("the next token of request %s cannot be sampled", request)
                self._fail(request, f"its next token cannot be sampled ({type(error).__name__}: {error})")
        return scores


def not_finite(dtype: torch.dtype) -> str:
    """Why a request ends whose hidden states or logits are NaN or infinite."""
    name = str(dtype).removeprefix("torch.")
    return f"its numbers are not finite: its weights are damaged, or they overflow in {name}"

"""Choosing the next token of every request in a batch, each by its own parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is continued.

    temperature: 0 is greedy. top_p, top_k: nucleus and number of candidates; 1.0 and 0 keep all. seed: makes the
    request repeatable whatever shares its batch. stop: texts that end the answer and are not part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
        }
        for field, fits in checks.items():
            if not fits:
                raise ConfigError(f"{field}: {getattr(self, field)!r} is out of range")


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
        """[vocabulary] float32 logits -> a token id."""
        params = self.params
        logits = logits.float().cpu() / params.temperature
        order = torch.argsort(logits, descending=True, stable=True)
        ranked = logits[order].softmax(0)
        keep = torch.ones_like(ranked, dtype=torch.bool)
        if params.top_k:
            keep[params.top_k :] = False
        keep &= ranked.cumsum(0) - ranked < params.top_p  # the token that crosses top_p stays
        return int(order[torch.multinomial(ranked * keep, 1, generator=self._generator)])


class StepSampler:
    """A logits processor for continuous batching: leaves each row one candidate, so that argmax takes it.

    Greedy rows pass untouched. `requests` and `samplers` are filled before the step.
    """

    supports_continuous_batching = True

    def __init__(self) -> None:
        self.rows: tuple[str, ...] = ()
        self.samplers: dict[str, Sampler] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[rows] last token ids (unused) and [rows, vocabulary] logits -> logits."""
        for row, request in enumerate(self.rows):
            sampler = self.samplers.get(request)
            if sampler is not None:
                token = sampler.choose(scores[row])
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores

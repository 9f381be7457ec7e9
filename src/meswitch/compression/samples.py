"""Calibration text as distillation takes it: what is held out, batches, and what each token counts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.compression.calibration import CalibrationSet
from meswitch.compression.recipe import Recipe
from meswitch.errors import ConfigError

_HELD_OUT = 128  # sequences at most
_HELD_OUT_BATCH = 16
_POOL = 8  # batches that are sorted by length together


def check_text(sequences: list[list[int]]) -> None:
    """Refuse text too short to train on and to hold a part out.

    Raises:
        ConfigError: fewer than 10 sequences.
    """
    if len(sequences) < 10:
        raise ConfigError(f"distill: {len(sequences)} calibration sequences are too few; give at least 10")


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids, where the assistant's last turn starts (0: all of it counts in full), and its place in the text."""

    ids: list[int]
    start: int
    number: int

    def cut(self, length: int | None) -> "Sample":
        return self if length is None else Sample(self.ids[:length], self.start, self.number)

    def weights(self, question: float) -> list[float]:
        """What each position counts: position `i` predicts token `i + 1`."""
        asked = min(max(0, self.start - 1), len(self.ids))
        return [question] * asked + [1.0] * (len(self.ids) - asked)


def split(text: CalibrationSet, recipe: Recipe, generator: torch.Generator) -> tuple[list[Sample], list[Sample]]:
    """A held-out tenth, and the rest, which is trained on."""
    samples = [
        Sample(ids, start, number)
        for number, (ids, start) in enumerate(zip(text.sequences, text.known_starts, strict=True))
    ]
    order = torch.randperm(len(samples), generator=generator).tolist()
    count = min(max(1, len(order) // 10), _HELD_OUT)
    return [samples[i] for i in order[:count]], [samples[i].cut(recipe.length) for i in order[count:]]


def batches(samples: list[Sample], size: int, generator: torch.Generator) -> Iterator[list[Sample]]:
    """Batches without end, every sample once before any comes again; of similar lengths, so that little is padding."""
    pool: list[Sample] = []
    while True:
        while len(pool) < size * _POOL:
            pool += [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
        chosen, pool = sorted(pool[: size * _POOL], key=lambda sample: len(sample.ids)), pool[size * _POOL :]
        for at in torch.randperm(_POOL, generator=generator).tolist():
            yield chosen[at * size : (at + 1) * size]


def in_batches(samples: list[Sample]) -> Iterator[list[Sample]]:
    """Every sample once, in batches of similar lengths."""
    ordered = sorted(samples, key=lambda sample: len(sample.ids))
    for start in range(0, len(ordered), _HELD_OUT_BATCH):
        yield ordered[start : start + _HELD_OUT_BATCH]


def weights(batch: list[Sample], question: float, device: torch.device) -> Tensor:
    """What each token of a batch counts: [tokens], of sum 1."""
    weight = torch.tensor([w for sample in batch for w in sample.weights(question)], device=device)
    return weight / weight.sum()


@torch.no_grad()
def mean(samples: list[Sample], question: float, value: Callable[[list[Sample]], float]) -> float:
    """Of a weighted mean over a batch's tokens, that over all samples'."""
    total = mass = 0.0
    for batch in in_batches(samples):
        count = sum(sum(sample.weights(question)) for sample in batch)
        total, mass = total + value(batch) * count, mass + count
    return total / mass

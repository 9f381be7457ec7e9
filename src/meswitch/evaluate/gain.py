"""Statistics of right and wrong answers: how sure an accuracy, a gain retained or a difference is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from meswitch.errors import ConfigError

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


class Interval(NamedTuple):
    low: float
    high: float


class Outcomes(Protocol):
    """What is compared here: answers to the same questions in the same order (`Score` is one)."""

    @property
    def task(self) -> str: ...
    @property
    def questions(self) -> str | int: ...
    @property
    def outcomes(self) -> Sequence[bool]: ...


def wilson(correct: int, total: int) -> Interval:
    """95 % Wilson score interval of a proportion; sensible at 0 and at `total`, unlike the normal one."""
    if not 0 <= correct <= total or total == 0:
        raise ConfigError(f"wilson: {correct} of {total} is not a proportion; give 0 <= correct <= total, total >= 1")
    p, z2 = correct / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # The ends are exact where nothing or everything is right; rounding would leave them a hair off.
    return Interval(0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half)


@dataclass(frozen=True, slots=True)
class GainRetained:
    """`(compressed - base) / (expert - base)` of the accuracies, with what it was computed from.

    `value` and `interval` are None where the expert is no better than the base: there is no gain to retain.
    """

    value: float | None
    interval: Interval | None  # 95 %, paired bootstrap over the questions
    compressed: int  # right answers of each model, of `total`
    expert: int
    base: int
    total: int


def gain_retained(
    compressed: Outcomes, expert: Outcomes, base: Outcomes, resamples: int = 4000, seed: int = 0
) -> GainRetained:
    """How much of what fine-tuning gained is left after compression, on the same questions.

    Raises:
        ConfigError: the three were not asked the same questions.
    """
    total = _paired(compressed, expert, base)
    table = np.stack([np.asarray(score.outcomes, dtype=np.int64) for score in (compressed, expert, base)])
    c, e, b = (int(count) for count in table.sum(axis=1))
    if e <= b:
        return GainRetained(None, None, c, e, b, total)
    # A question falls in one of 8 cells (who answered it right), so resampling questions is drawing cell counts.
    cell = table[0] * 4 + table[1] * 2 + table[2]
    share = np.bincount(cell, minlength=8) / total
    drawn = np.random.default_rng(seed).multinomial(total, share, size=resamples)
    cs, es, bs = (drawn @ np.array([(i >> shift) & 1 for i in range(8)]) for shift in (2, 1, 0))
    kept = es > bs
    low, high = np.quantile((cs - bs)[kept] / (es - bs)[kept], [0.025, 0.975])
    return GainRetained((c - b) / (e - b), Interval(float(low), float(high)), c, e, b, total)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same questions: what the second lost and gained against the first."""

    both: int
    lost: int  # only the first was right
    gained: int  # only the second was right
    neither: int
    p_value: float  # exact McNemar test: how likely so uneven a split is if neither model is better


def compare(first: Outcomes, second: Outcomes) -> Comparison:
    """Paired comparison of two models by the questions they disagree on.

    Raises:
        ConfigError: the two were not asked the same questions.
    """
    total = _paired(first, second)
    pairs = list(zip(first.outcomes, second.outcomes, strict=True))
    both, lost, gained = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
    return Comparison(both, lost, gained, total - both - lost - gained, _mcnemar(lost, gained))


def _mcnemar(lost: int, gained: int) -> float:
    """Two-sided binomial probability of a split at least as uneven, from exact integers."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return min(1.0, (2 * tail) / 2**n)


def _paired(*scores: Outcomes) -> int:
    asked = {(score.task, str(score.questions), len(score.outcomes)) for score in scores}
    if len(asked) > 1:
        said = "; ".join(f"{n} of {task} ({questions:.12})" for task, questions, n in sorted(asked))
        raise ConfigError(f"scores: not the same questions: {said}; ask all models the same")
    return len(scores[0].outcomes)

"""Two routers as one: a cheap one first, a better one where the first is unsure (a cascade), or both always."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from meswitch.router.base import OTHER, Messages, Router, RouterError
from meswitch.router.calibrate import COVERAGE, auroc, calibration_error, temperature, threshold
from meswitch.router.data import Row
from meswitch.router.store import (
    OpenOptions,
    ScoreCalibration,
    check_members,
    check_no_tensors,
    open_member,
    register_router,
    write_router,
)

_LEAST = 1e-6  # a probability of zero, and of a label that one of the two does not know


@dataclass(frozen=True, slots=True)
class CascadeFile:
    """`router.json` of a cascade; its two routers are the directories `first` and `second`.

    Args:
        margin: below which lead of the first router's best label the second is asked too; None asks both always.
        weight: of the second router's log-probabilities, 0 to 1.
        members: SHA-256 of each router's `router.json`.
    """

    kind: str
    experts: tuple[str, ...]
    margin: float | None
    weight: float
    calibration: ScoreCalibration
    members: dict[str, str]
    tensors_sha256: str = ""


@register_router("cascade")
class CascadeRouter(Router):
    """See the module's docstring; `fit_cascade` chooses margin, weight and threshold, `save` and `load_router` keep it.

    Args:
        first: the router that is asked for every query.
        second: another one over the same experts.
        margin: the second is asked where the first's best label leads the next one by less; None asks it always.
        weight: of the second's log-probabilities where it is asked.

    Raises:
        RouterError: the two do not know the same experts.
    """

    file = CascadeFile

    def __init__(
        self,
        first: Router,
        second: Router,
        calibration: ScoreCalibration,
        *,
        margin: float | None,
        weight: float,
        fallback: str = "base",
        threshold: float | None = None,
    ) -> None:
        if set(first.experts) != set(second.experts):
            raise RouterError(
                f"experts: the first router knows {', '.join(first.experts)}, the second {', '.join(second.experts)}; "
                "train both for the same family"
            )
        self.first, self.second = first, second
        self.experts = first.experts
        self.labels = (*self.experts, OTHER)
        self.margin, self.weight = margin, weight
        self.calibration = calibration
        self.fallback = fallback
        self.threshold = calibration.threshold if threshold is None else threshold

    def scores(self, messages_batch: Sequence[Messages]) -> list[dict[str, float]]:
        if not messages_batch:
            return []
        logits = log_scores(self.first, messages_batch, self.labels)
        asked = unsure(logits, self.margin).nonzero()[:, 0].tolist()
        if asked:
            second = log_scores(self.second, [messages_batch[i] for i in asked], self.labels)
            logits[asked] = (1 - self.weight) * logits[asked] + self.weight * second
        rows = (logits / self.calibration.temperature).softmax(1).tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in rows]

    def save(self, path: str | Path) -> None:
        """Write the router and the two it is made of as a directory in one step.

        Raises:
            RouterError: `path` exists and is not a router, or cannot be written.
        """
        file = CascadeFile("cascade", self.experts, self.margin, self.weight, self.calibration, {})
        write_router(Path(path), file, {}, {"first": self.first, "second": self.second})  # type: ignore[dict-item]

    @classmethod
    def open(cls, directory: Path, file: CascadeFile, given: OpenOptions) -> "CascadeRouter":
        """
        Raises:
            RouterError: one of the two is missing, damaged or not the one that it was saved with.
        """
        check_no_tensors(directory, file)
        check_members(directory, file, ("first", "second"))
        return cls(
            open_member(directory / "first", given),
            open_member(directory / "second", given),
            file.calibration,
            margin=file.margin,
            weight=file.weight,
            fallback=given.fallback,
            threshold=given.threshold,
        )


def log_scores(router: Router, messages_batch: Sequence[Messages], labels: Sequence[str]) -> Tensor:
    """[n, labels] float64 log-probabilities, in the order of `labels`."""
    scored = router.scores(messages_batch)
    values = torch.tensor([[scores.get(label, 0.0) for label in labels] for scores in scored], dtype=torch.float64)
    return values.clamp_min(_LEAST).log().log_softmax(1)


def unsure(logits: Tensor, margin: float | None) -> Tensor:
    """[n] bool: where the best label's probability leads the next one's by less than `margin`."""
    if margin is None:
        return torch.ones(len(logits), dtype=torch.bool)
    return leads(logits) < margin


def leads(logits: Tensor) -> Tensor:
    """[n] float64: by how much the best label's probability leads the next one's."""
    best = logits.softmax(1).topk(2, 1).values
    return best[:, 0] - best[:, 1]


def fit_cascade(
    first: Router, second: Router, rows: Sequence[Row], *, asked: float | None = 0.2, fallback: str = "base"
) -> CascadeRouter:
    """Choose margin, weight, temperature and threshold by rows that neither router was trained on.

    Args:
        asked: the share of queries that may go to the second router; None asks both for every query (an ensemble).

    The weight is the one that makes the rows likeliest.

    Raises:
        RouterError: the two do not know the same experts, or the rows have a domain that is none of them.
    """
    router = CascadeRouter(
        first, second, ScoreCalibration(1.0, 0.0, 0.0, 0.0), margin=None, weight=0.5, fallback=fallback
    )
    labels = list(router.labels)
    for row in rows:
        if row.domain not in labels:
            raise RouterError(f"domain: {row.domain!r} is no expert of these routers ({', '.join(router.experts)})")
    if not rows:
        raise RouterError("data: no rows; a cascade is fitted on rows that neither router was trained on")
    targets = torch.tensor([labels.index(row.domain) for row in rows])
    batch: list[Messages] = [[{"role": "user", "content": row.query}] for row in rows]
    one, two = (log_scores(member, batch, labels) for member in (first, second))
    margin = None if asked is None else float(leads(one).quantile(asked))
    where = unsure(one, margin)
    weight = _weight(one[where], two[where], targets[where])
    logits = torch.where(where[:, None], (1 - weight) * one + weight * two, one)
    divisor = temperature(logits, targets)
    experts = len(router.experts)
    confidence, best = (logits / divisor).softmax(1)[:, :experts].max(1)
    known = targets < experts
    right = (best == targets)[known]
    router.margin, router.weight = margin, weight
    router.calibration = ScoreCalibration(
        temperature=divisor,
        threshold=threshold(confidence[known], confidence[~known], COVERAGE) if len(right) else 0.0,
        accuracy=float(right.double().mean()) if len(right) else 0.0,
        ece=calibration_error(confidence[known], right),
        auroc=auroc(confidence[known], confidence[~known]),
    )
    router.threshold = router.calibration.threshold
    return router


def _weight(one: Tensor, two: Tensor, targets: Tensor) -> float:
    """The second router's share of the log-probabilities that gives the labels the highest likelihood."""
    if not len(targets):
        return 0.5
    grid = torch.linspace(0, 1, 21, dtype=torch.float64)
    losses = torch.stack([nll_loss(((1 - w) * one + w * two).log_softmax(1), targets) for w in grid])
    return float(grid[losses.argmin()])

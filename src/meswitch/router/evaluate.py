"""How good a router is on labelled queries."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from meswitch.router.base import OTHER, Router, as_messages
from meswitch.router.calibrate import auroc, calibration_error, reliability
from meswitch.router.data import Row, without_labels

_BATCH = 256
_TIMED = 100  # queries timed one at a time


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one router on one data set.

    A row with an expert's domain is right if that expert scores best, whether or not the router would then abstain;
    an `other` row is right if the router abstains.

    accuracy: share right of the rows with an expert's domain. per_domain, per_source: share right of all rows there.
    confusion: domain -> {what the router does -> rows}; the column `other` counts abstentions. ece: expected
    calibration error of the best expert's probability, rows with an expert's domain. auroc: how well that probability
    tells those rows from `other` rows. coverage: share of the rows with an expert's domain that is answered.
    latency_ms: of a single query, mean, p50 and p95. None: the data has no rows to tell.

    risk_coverage: (coverage, share wrong of what is then answered) of the experts' rows, the surest first.
    reliability: (mean probability of the best expert, share right, rows) of bins of that probability, experts' rows.
    accepted_other: share of `other` rows answered at the threshold that answers 95 % of the experts' rows. unlabelled:
    in domains whose rows often open with a label ("Write a SQL query: "), share right of those that do not. bytes: of
    the router in memory with its encoder, None if it does not say.
    """

    accuracy: float | None
    per_domain: dict[str, float]
    per_source: dict[str, float]
    confusion: dict[str, dict[str, int]]
    ece: float | None
    auroc: float | None
    coverage: float | None
    latency_ms: dict[str, float]
    risk_coverage: list[tuple[float, float]]
    reliability: list[tuple[float, float, int]]
    accepted_other: float | None
    unlabelled: dict[str, float]
    bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_router(router: Router, rows: Sequence[Row]) -> Evaluation:
    """Score all rows in batches, then time some of them one by one."""
    scored: list[dict[str, float]] = []
    for start in range(0, len(rows), _BATCH):
        scored += router.scores([as_messages(row.query) for row in rows[start : start + _BATCH]])
    best = [max(router.experts, key=lambda name: scores[name]) for scores in scored]
    confidence = torch.tensor([scores[name] for scores, name in zip(scored, best, strict=True)], dtype=torch.float64)
    done = [OTHER if router.decide(s).reason == "abstained" else name for s, name in zip(scored, best, strict=True)]
    known = torch.tensor([row.domain != OTHER for row in rows], dtype=torch.bool)
    right = torch.tensor(
        [
            (doing if row.domain == OTHER else name) == row.domain
            for row, name, doing in zip(rows, best, done, strict=True)
        ],
        dtype=torch.bool,
    )
    answered = torch.tensor([doing != OTHER for doing in done], dtype=torch.bool)
    some = bool(known.any())
    return Evaluation(
        accuracy=float(right[known].double().mean()) if some else None,
        per_domain=_shares([row.domain for row in rows], right.tolist()),
        per_source=_shares([row.source for row in rows], right.tolist()),
        confusion=_confusion(router.experts, [row.domain for row in rows], done),
        ece=calibration_error(confidence[known], right[known]) if some else None,
        auroc=auroc(confidence[known], confidence[~known]),
        coverage=float(answered[known].double().mean()) if some else None,
        latency_ms=latency(router, rows),
        risk_coverage=risk_coverage(confidence[known], right[known]),
        reliability=reliability(confidence[known], right[known]),
        accepted_other=accepted(confidence[known], confidence[~known]),
        unlabelled=_unlabelled(rows, right.tolist()),
        bytes=router.nbytes() if hasattr(router, "nbytes") else None,
    )


def risk_coverage(confidence: torch.Tensor, right: torch.Tensor, points: int = 20) -> list[tuple[float, float]]:
    """(coverage, share wrong) of the surest rows, in `points` steps of equal coverage; confidence, right: [n]."""
    order = confidence.argsort(descending=True, stable=True)
    wrong = (~right[order]).double().cumsum(0)
    counts = sorted({max(1, round(len(order) * i / points)) for i in range(1, points + 1)}) if len(order) else []
    return [(count / len(order), float(wrong[count - 1]) / count) for count in counts]


def accepted(known: torch.Tensor, other: torch.Tensor, coverage: float = 0.95) -> float | None:
    """Share of `other` [m] at least as sure as the `coverage` surest of `known` [n]; None if either is empty."""
    if not len(known) or not len(other):
        return None
    needed = min(len(known), max(1, round(coverage * len(known))))
    return float((other >= known.sort(descending=True).values[needed - 1]).double().mean())


def _unlabelled(rows: Sequence[Row], right: list[bool]) -> dict[str, float]:
    labelled = {i for i, _ in without_labels(rows)}
    domains = {rows[i].domain for i in labelled}
    kept = [i for i, row in enumerate(rows) if row.domain in domains and i not in labelled]
    return _shares([rows[i].domain for i in kept], [right[i] for i in kept])


def _shares(keys: list[str], right: list[bool]) -> dict[str, float]:
    members: dict[str, list[bool]] = {}
    for key, value in zip(keys, right, strict=True):
        members.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in sorted(members.items())}


def _confusion(experts: Sequence[str], domains: list[str], done: list[str]) -> dict[str, dict[str, int]]:
    labels = [*experts, OTHER]
    table = {domain: dict.fromkeys(labels, 0) for domain in labels}
    for domain, doing in zip(domains, done, strict=True):
        table[domain][doing] += 1
    return table


def latency(router: Router, rows: Sequence[Row], count: int = _TIMED) -> dict[str, float]:
    """Milliseconds of about `count` of the queries, one at a time: mean, p50 and p95."""
    if not rows:
        return {}
    sample = rows[:: max(1, len(rows) // count)][:count]
    router.route(sample[0].query)  # the first call pays for lazy initialisation
    times = []
    for row in sample:
        start = time.perf_counter()
        router.route(row.query)
        times.append((time.perf_counter() - start) * 1e3)
    measured = torch.tensor(times, dtype=torch.float64)
    return {
        "mean": float(measured.mean()),
        "p50": float(measured.quantile(0.5)),
        "p95": float(measured.quantile(0.95)),
    }

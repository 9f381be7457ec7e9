"""How sure a score is, and from which one on to answer: temperature, threshold and the figures of both."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from meswitch.errors import ConfigError


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The divisor of `logits` [n, classes] that gives held-out `labels` [n] the highest likelihood.

    Labels are smoothed by one row's worth of doubt (Platt): a few hundred rows that are all right must not make the
    router certain of everything.
    """
    doubt = 1 / (len(labels) + 2)
    # A search of one number over a fixed grid: exact enough (2 %), deterministic, never diverges.
    grid = torch.logspace(-1.5, 1.5, 350, dtype=torch.float64)
    losses = torch.stack([cross_entropy(logits.double() / t, labels, label_smoothing=doubt) for t in grid])
    return float(grid[losses.argmin()])


def line(logits: Tensor, positive: Tensor) -> tuple[float, float]:
    """Slope and shift that make `sigmoid(slope x logits + shift)` most likely for held-out `positive` [n] bool.

    Targets are Platt's, (n + 1) / (n + 2) and 1 / (m + 2), so that perfectly separated rows give finite numbers;
    Newton's method from (1, 0).
    """
    x = torch.stack([logits.double(), torch.ones(len(logits), dtype=torch.float64)], 1)
    count = int(positive.sum())
    high, low = (count + 1) / (count + 2), 1 / (len(positive) - count + 2)
    target = torch.where(positive, high, low).double()
    w = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(x @ w)
        step = torch.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + 1e-6 * torch.eye(2), x.T @ (p - target))
        w = w - step * min(1.0, 1.0 / float(step.norm().clamp_min(1e-9)))  # damped: far out the curvature vanishes
    return max(float(w[0]), 1e-3), float(w[1])


def threshold(known: Tensor, other: Tensor, coverage: float) -> float:
    """The confidence below which to abstain.

    Args:
        known: [n] held-out confidences of queries that some expert is for.
        other: [m] of queries that none is for; [0] if there are none.
        coverage: the share of known queries to answer, where there are no others.

    With others it is the middle of the range where (share of known answered) + (share of others refused) is within 0.01
    of its highest; the peak itself is flat, and other traffic moves it.
    """
    known = known.double().sort().values
    if not len(other):
        return float(known.quantile(1 - coverage))
    other = other.double().sort().values
    edges = torch.cat([known, other]).unique()
    bounds = torch.cat([torch.zeros(1, dtype=torch.float64), edges, torch.ones(1, dtype=torch.float64)])
    middles = (bounds[1:] + bounds[:-1]) / 2  # thresholds that differ in what they do
    answered = 1 - torch.searchsorted(known, middles) / len(known)
    refused = torch.searchsorted(other, middles) / len(other)
    gain = answered + refused
    best = (gain >= gain.max() - 0.01).nonzero()[:, 0]
    return float((bounds[best[0]] + bounds[best[-1] + 1]) / 2)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean |confidence - accuracy| over bins of equal width, weighted by their rows.

    Args:
        confidence: [n] in 0..1.
        correct: [n] bool.
    """
    gaps = [abs(sure - share) * rows for sure, share, rows in reliability(confidence, correct, bins)]
    return sum(gaps) / max(1, len(confidence))


def reliability(confidence: Tensor, right: Tensor, bins: int = 15) -> list[tuple[float, float, int]]:
    """(mean confidence, share right, rows) of bins of equal width; empty ones are left out.

    Args:
        confidence: [n] in 0..1.
        right: [n] bool.
    """
    which = (confidence * bins).long().clamp(0, bins - 1)
    found = [which == i for i in range(bins)]
    return [
        (float(confidence[own].double().mean()), float(right[own].double().mean()), int(own.sum()))
        for own in found
        if bool(own.any())
    ]


def auroc(positive: Tensor, negative: Tensor) -> float | None:
    """Probability that a positive scores higher than a negative (a tie counts half); None if either is missing."""
    if not len(positive) or not len(negative):
        return None
    ranked = negative.double().sort().values
    values = positive.double().contiguous()
    below = torch.searchsorted(ranked, values, side="left") + torch.searchsorted(ranked, values, side="right")
    return float(below.double().mean() / 2 / len(ranked))


# The threshold that a target asks for, chosen on held-out predictions.


COVERAGE = 0.99  # of known queries to answer, where neither a target nor rows of `other` say more


def choose_threshold(
    confidence: Tensor, right: Tensor, known: Tensor, *, precision: float | None = None, coverage: float | None = None
) -> float:
    """The confidence below which to abstain.

    Args:
        confidence: [n] of the best expert.
        right: [n] bool, whether that expert is the row's (of `other` rows: False).
        known: [n] bool, whether the row is some expert's.
        precision: the lowest threshold at which at least this share of the answered rows goes to the right expert;
            an `other` row that is answered counts as wrong. What it means for traffic depends on how much of it no
            expert is for: the share in the data is taken as it is.
        coverage: the highest threshold that answers at least this share of the known rows. With both, the precision
            comes first.

    Raises:
        ConfigError: a target outside 0..1, or a precision that no threshold reaches.
    """
    for name, value in (("precision", precision), ("coverage", coverage)):
        if value is not None and not 0 < value <= 1:
            raise ConfigError(f"target {name}: {value} is not a share; give a number above 0 and up to 1")
    if precision is not None:
        return _for_precision(confidence, right & known, precision)
    if coverage is not None:
        return _for_coverage(confidence[known], coverage)
    return threshold(confidence[known], confidence[~known], COVERAGE)


def _for_precision(confidence: Tensor, right: Tensor, wanted: float) -> float:
    values, order = confidence.double().sort(descending=True)
    reached = right[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    ends = torch.cat([values[1:] < values[:-1], torch.tensor([True])])  # rows of equal confidence go together
    good = ((reached >= wanted) & ends).nonzero()[:, 0]
    if not len(good):
        best = float(reached[ends].max())
        raise ConfigError(f"target precision: {wanted} is never reached on held-out rows, {best:.4f} at best; ask less")
    last = int(good[-1])
    below = float(values[last + 1]) if last + 1 < len(values) else 0.0
    return (float(values[last]) + below) / 2


def _for_coverage(known: Tensor, wanted: float) -> float:
    values = known.double().sort(descending=True).values
    needed = min(len(values), -(-int(wanted * len(values) * 1e6) // 1_000_000))  # ceil, safe against 0.95 * 20
    return float(values[max(0, needed - 1)])

"""The mathematics of the linear heads and their calibration: tensors in, tensors out."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from meswitch.router.lexical import Bags


def naive_bayes(bags: Bags, labels: Tensor, classes: int, buckets: int, smoothing: float) -> Tensor:
    """Log-odds of each feature in each class, uniform prior: [buckets, classes] float32.

    labels: [n] int64. A generative head, because it spreads its trust over all features of a class; a discriminative
    one leans on the few that separate the training data best, and those change with the source of the queries.
    """
    counts = torch.zeros(buckets, classes)
    of_feature = torch.repeat_interleave(labels, bags.lengths())
    counts.index_put_((bags.indices, of_feature), torch.ones(len(of_feature)), accumulate=True)
    counts += smoothing
    log = torch.log(counts / counts.sum(0))
    return log - log.mean(1, keepdim=True)


def logistic(x: Tensor, labels: Tensor, classes: int, l2: float, evenness: float = 0.5) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS from zero: weight [features, classes], bias [classes], float32.

    x: [n, features] float32, standardised. A row weighs by its class's size to the power -evenness: 0 takes classes
    as they come, 1 makes all alike; the loss is the weighted mean cross-entropy + l2 x the sum of squared weights.
    """
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    sizes = torch.bincount(labels, minlength=classes).clamp_min(1)
    importance = sizes[labels].float().pow(-evenness)
    importance /= importance.mean()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (importance * cross_entropy(x @ weight + bias, labels, reduction="none")).mean()
        value = value + l2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


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

    known, other: [n], [m] held-out confidences of queries that some expert, or none, is for. With `other` rows: the
    middle of the range where (share of known answered) + (share of other refused) is within 0.01 of its highest; the
    peak itself is flat, and other traffic moves it. Without: answers the share `coverage` of the known.
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

    confidence: [n] in 0..1. correct: [n] bool.
    """
    gaps = [abs(sure - share) * rows for sure, share, rows in reliability(confidence, correct, bins)]
    return sum(gaps) / max(1, len(confidence))


def reliability(confidence: Tensor, right: Tensor, bins: int = 15) -> list[tuple[float, float, int]]:
    """(mean confidence, share right, rows) of bins of equal width; empty ones are left out.

    confidence: [n] in 0..1. right: [n] bool.
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

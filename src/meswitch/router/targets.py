"""The threshold that a target asks for, chosen on held-out predictions."""

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.router.heads import threshold

COVERAGE = 0.99  # of known queries to answer, where neither a target nor rows of `other` say more


def choose_threshold(
    confidence: Tensor, right: Tensor, known: Tensor, *, precision: float | None = None, coverage: float | None = None
) -> float:
    """The confidence below which to abstain.

    Args:
        confidence: [n] of the best expert. right: [n] bool, whether that expert is the row's (of `other` rows: False).
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

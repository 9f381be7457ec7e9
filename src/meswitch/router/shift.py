"""Head starts for experts whose queries lose to others' when they come from a new source.

A domain whose sources are alike, or narrow, wins fewer of the queries of a source it has not seen than a broad one: a
question to an unknown database looks like a general question. Leaving sources out of the training shows by how much,
and an offset of the expert's logit mends it. A domain of a single source has nothing to leave out: it gets the mean
of the others' offsets, so that it is neither ahead nor behind.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from meswitch.router.data import Row

_LEAST = 20  # rows of a source from which leaving it out says something
_MOST = 8  # sources of a domain to leave out: each costs a fit
_NEAR = 2.0  # how much more rows like the training data count: leaving out 1 of few sources overstates a shift


def sources_of(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Domain -> the largest of its sources, for domains that have at least two to leave out."""
    sizes = Counter((row.domain, row.source) for row in rows)
    found: defaultdict[str, list[str]] = defaultdict(list)
    for (domain, source), size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        if size >= _LEAST and len(found[domain]) < _MOST:
            found[domain].append(source)
    return {domain: sources for domain, sources in found.items() if len(sources) > 1}


def offsets(near: Tensor, targets: Tensor, far: Tensor, far_targets: Tensor, groups: Tensor, free: Tensor) -> Tensor:
    """[experts] float32, what to add to the logits; those not `free` [experts] bool get the mean of those that are.

    Traffic is taken to be partly like the training data and partly from sources that are not in it: the offsets give
    both the least mean cross-entropy together, every domain weighing the same, and in the far part every source of it.
    Each part has a temperature of its own, because the far one is less sure.

    near: [n, experts] logits of held-out rows, targets: [n]. far: [m, experts] logits of rows whose source was left
    out, far_targets, groups: [m] int64, the row's source.
    """
    parts = [(near, targets, _NEAR * _even(targets, targets)), (far, far_targets, _even(far_targets, groups))]
    shift = torch.zeros(near.shape[1], dtype=torch.float64, requires_grad=True)
    scale = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([shift, scale], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.zeros((), dtype=torch.float64)
        for (logits, labels, weights), log_scale in zip(parts, scale, strict=True):
            moved = (logits.double() + _spread(shift, free)) * log_scale.exp()
            value = value + (weights * cross_entropy(moved, labels, reduction="none")).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return _spread(shift.detach(), free).float()


def _spread(shift: Tensor, free: Tensor) -> Tensor:
    """`shift` where `free` and its mean elsewhere, less that mean: only differences count."""
    return (shift - shift[free].mean()) * free


def _even(domains: Tensor, groups: Tensor) -> Tensor:
    """[n] float64, sum 1: every domain the same, every group of it the same."""
    pairs = list(zip(domains.tolist(), groups.tolist(), strict=True))
    sizes = Counter(pairs)
    parts = Counter(domain for domain, _ in sizes)
    return torch.tensor(
        [1 / (len(parts) * parts[domain] * sizes[domain, group]) for domain, group in pairs], dtype=torch.float64
    )

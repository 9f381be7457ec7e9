"""Training the embedding router: features once, heads in closed form and by L-BFGS, calibration on held-out folds."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

import torch
from torch import Tensor

from meswitch.router.base import OTHER, RouterError
from meswitch.router.data import Row
from meswitch.router.embedding import EmbeddingRouter, Features, Heads, extract
from meswitch.router.encoder import Encoder, Progress
from meswitch.router.heads import auroc, calibration_error, logistic, naive_bayes, temperature, threshold
from meswitch.router.storage import Calibration, Provenance, Settings
from meswitch.threads import fitting_threads
from meswitch.version import __version__

COVERAGE = 0.99  # of known queries to answer, where the data has no `other` rows to set the threshold by


def default_settings(encoder: Encoder, seed: int = 0) -> Settings:
    """Two thirds up the model, where states say most about meaning, and its last layer."""
    depth = encoder.depth
    return Settings(layers=tuple(sorted({max(1, round(depth * 2 / 3)), depth})), seed=seed)


def train_router(
    rows: Sequence[Row],
    experts: Sequence[str],
    encoder: Encoder,
    *,
    settings: Settings | None = None,
    data_sha256: str = "",
    fallback: str = "base",
    progress: Progress | None = None,
) -> EmbeddingRouter:
    """Train on labelled queries; the same rows, settings and machine give the same router.

    Rows of domain `other` become a label of their own and set the threshold; without them the threshold answers
    99 % of the known queries. Temperature, threshold and the figures in `calibration` come from predictions for rows
    that the heads did not see (`settings.folds` folds; equal queries are always in the same fold). The router itself
    is then fitted on all rows.

    Raises:
        RouterError: a domain that is no expert, an expert without enough rows, or fewer than two labels.
    """
    settings = settings or default_settings(encoder)
    labels = _labels(rows, experts, settings.folds)
    with fitting_threads(encoder.model.device, encoder.hidden_size):
        targets = torch.tensor([labels.index(row.domain) for row in rows])
        features = extract(encoder, [row.query for row in rows], settings, progress)
        heads, calibration = _train(rows, features, targets, len(labels), len(experts), settings)
    provenance = _provenance(rows, data_sha256)
    return EmbeddingRouter(encoder, heads, experts, settings, calibration, provenance, fallback=fallback)


def _train(
    rows: Sequence[Row], features: Features, targets: Tensor, labels: int, experts: int, settings: Settings
) -> tuple[Heads, Calibration]:
    """Calibration from held-out predictions, then heads from all rows."""
    fold = _folds(rows, settings.folds, settings.seed)
    held_out = torch.zeros(len(rows), labels)
    for k in range(settings.folds):
        seen, unseen = (fold != k).nonzero()[:, 0], (fold == k).nonzero()[:, 0]
        heads = _fit(features.select(seen), targets[seen], labels, settings)
        held_out[unseen] = heads.logits(features.select(unseen))
    return _fit(features, targets, labels, settings), _calibrate(held_out, targets, experts)


def _labels(rows: Sequence[Row], experts: Sequence[str], folds: int) -> list[str]:
    if OTHER in experts:
        raise RouterError(f"expert.name: {OTHER!r} means 'no expert' in routing data; rename the expert")
    queries: dict[str, set[str]] = {}
    for row in rows:
        queries.setdefault(row.domain, set()).add(_normal(row.query))
    for domain in queries.keys() - {*experts, OTHER}:
        raise RouterError(f"domain: {domain!r} is no expert of the family ({', '.join(experts)})")
    for name in (*experts, *([OTHER] if OTHER in queries else [])):
        count = len(queries.get(name, ()))
        if count < folds:
            raise RouterError(f"domain: {name!r} has {count} distinct queries in the data; at least {folds} are needed")
    labels = [*experts, *([OTHER] if OTHER in queries else [])]
    if len(labels) < 2:
        raise RouterError(f"domain: nothing to tell apart; a router needs two experts, or rows of {OTHER!r}")
    return labels


def _normal(query: str) -> str:
    return " ".join(query.lower().split())


def _folds(rows: Sequence[Row], folds: int, seed: int) -> Tensor:
    """[n] int64: each row's fold. Every domain is spread evenly, and equal queries stay together."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(_normal(row.query), []).append(i)
    by_domain: dict[str, list[list[int]]] = {}
    for group in groups.values():
        by_domain.setdefault(rows[group[0]].domain, []).append(group)
    generator = torch.Generator().manual_seed(seed)
    fold = torch.zeros(len(rows), dtype=torch.int64)
    for domain in sorted(by_domain):
        members = by_domain[domain]
        for place, which in enumerate(torch.randperm(len(members), generator=generator).tolist()):
            fold[members[which]] = place % folds
    return fold


def _fit(features: Features, targets: Tensor, classes: int, settings: Settings) -> Heads:
    words = naive_bayes(features.words, targets, classes, settings.buckets, settings.smoothing)
    states = features.states
    mean = states.mean(0)
    # 1/sqrt(width): the same l2 then means the same for models of any width.
    scale = 1 / (states.std(0).clamp_min(1e-3) * states.shape[1] ** 0.5)
    weight, bias = logistic((states - mean) * scale, targets, classes, settings.l2)
    return Heads(words, mean, scale, weight, bias)


def _calibrate(logits: Tensor, targets: Tensor, experts: int) -> Calibration:
    """Temperature, threshold and figures from held-out logits [n, labels]."""
    divisor = temperature(logits, targets)
    confidence, best = (logits.double() / divisor).softmax(1)[:, :experts].max(1)
    known = targets < experts
    correct = (best == targets)[known]
    return Calibration(
        temperature=divisor,
        threshold=threshold(confidence[known], confidence[~known], COVERAGE),
        accuracy=float(correct.double().mean()),
        ece=calibration_error(confidence[known], correct),
        auroc=auroc(confidence[known], confidence[~known]),
    )


def _provenance(rows: Sequence[Row], data_sha256: str) -> Provenance:
    import transformers

    return Provenance(
        data_sha256=data_sha256,
        rows=dict(sorted(Counter(row.domain for row in rows).items())),
        meswitch=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )

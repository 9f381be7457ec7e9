"""Training the embedding router: features once, heads in closed form and by L-BFGS, calibration on held-out folds.

A new expert needs a few examples and no training data (`add_experts`): it gets a column of its own in both heads,
fitted on its examples against the rows that the router has kept (`KeptRows`). All other columns stay as they are: among
the experts there were, nothing changes but that the new one may take a query. Its words count for nothing, because a
few examples say too little about words.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from meswitch.cpu import fitting_threads
from meswitch.router.base import OTHER, RouteOption, RouterError
from meswitch.router.calibrate import auroc, calibration_error, choose_threshold, line, temperature
from meswitch.router.data import Row, folds, in_lower_case, plain, without_labels
from meswitch.router.described import MANY, Prior, Space, layers_of, says_enough
from meswitch.router.embedding import (
    Bags,
    EmbeddingRouter,
    EmbeddingSettings,
    Features,
    Heads,
    KeptRows,
    Learnt,
    Linear,
    extract,
    odds_with_prior,
    with_prior,
)
from meswitch.router.encoder import Progress, TextEncoder
from meswitch.router.store import (
    RouterProvenance,
    ScoreCalibration,
)

# The mathematics of the linear heads: tensors in, tensors out.

_LEAST = 20  # rows of a source from which leaving it out says something
_MOST = 8  # sources of a domain to leave out: each costs a fit
_NEAR = 2.0  # how much more rows like the training data count: leaving out 1 of few sources overstates a shift
LEAST_EXAMPLES = 5  # different examples
_TRUST = 0.7  # in the heads' log-odds beside lines: on new sources they are surer than right (measured on 15 sources)
_MODESTY = 1.5  # log-odds by which a new expert must lead those that rows were seen of, where all have lines
_FIRMNESS = 2.5  # times the router's own penalty on weights, because there are fewer rows


def naive_bayes(bags: Bags, labels: Tensor, classes: int, buckets: int, smoothing: float) -> Tensor:
    """Log-odds of each feature in each class, uniform prior: [buckets, classes] float32.

    Args:
        labels: [n] int64. A generative head, because it spreads its trust over all features of a class; a
            discriminative one leans on the few that separate the training data best, and those change with the source
            of the queries.
    """
    counts = torch.zeros(buckets, classes)
    of_feature = torch.repeat_interleave(labels, bags.lengths())
    counts.index_put_((bags.indices, of_feature), torch.ones(len(of_feature)), accumulate=True)
    counts += smoothing
    log = torch.log(counts / counts.sum(0))
    return log - log.mean(1, keepdim=True)


def logistic(x: Tensor, labels: Tensor, classes: int, l2: float, evenness: float = 0.5) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS from zero: weight [features, classes], bias [classes], float32.

    Args:
        x: [n, features] float32, standardised. A row weighs by its class's size to the power -evenness: 0 takes classes
            as they come, 1 makes all alike; the loss is the weighted mean cross-entropy + l2 x the sum of squared
            weights.
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


# Head starts for experts whose queries lose to others' when they come from a new source.
#
# A domain whose sources are alike, or narrow, wins fewer of the queries of a source it has not seen than a broad
# one: a question to an unknown database looks like a general question. Leaving sources out of the training shows by
# how much, and an offset of the expert's logit mends it. A domain of a single source has nothing to leave out: it
# gets the mean of the others' offsets, so that it is neither ahead nor behind.


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

    Args:
        near: [n, experts] logits of held-out rows, targets: [n].
        far: [m, experts] logits of rows whose source was left out, far_targets, groups: [m] int64, the row's source.
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


def default_settings(encoder: TextEncoder, seed: int = 0, experts: int = 0) -> EmbeddingSettings:
    """Two thirds up the model, where states say most about meaning; a third up to tell others.

    Layers and penalties were compared by leaving sources out; the words' weight beside a sentence encoder lies between
    two that were (0 and 0.5). Of many experts the fine differences count, and a sentence encoder's are higher up:
    there it is the upper half and next to no penalty (CLINC150's validation part: 0.91 with the former, 0.97).
    """
    depth = encoder.depth
    small = encoder.source == "base"
    middle = max(1, round(depth * 2 / 3)) if depth else 0
    settings = EmbeddingSettings(
        layers=(middle,),
        known_layers=(max(1, round(depth / 3)),) if small and depth else (middle,),
        words=1.0 if small else 0.25,
        l2=2e-5 if small else 2e-4,
        style=not small,
        lower=small,
        encoder=encoder.source,
        bits=getattr(encoder, "bits", 32),
        seed=seed,
        # A base of any size says less of what a line means than an encoder of sentences (the family of the examples).
        # Beside a prior that knows kinds of request, 1.5 is no better and surer than it should be (the 15 sources).
        prior=0.25 if small else 1.0,
        own=0.5 if small else 0.15,
    )
    if small or experts < MANY:
        return settings
    upper = layers_of(encoder)
    return replace(settings, layers=upper, known_layers=upper, l2=2e-6, prior=1.5)


def train_router(
    rows: Sequence[Row],
    experts: Sequence[str],
    encoder: TextEncoder,
    *,
    settings: EmbeddingSettings | None = None,
    options: Sequence[RouteOption] = (),
    data_sha256: str = "",
    fallback: str = "base",
    progress: Progress | None = None,
) -> EmbeddingRouter:
    """Train on labelled queries; the same rows, settings and machine give the same router.

    Rows of domain `other` train the head that tells them and set the threshold, unless the settings name a target;
    without either the threshold answers 99 % of the known queries. ScoreCalibration, threshold and the figures in
    `calibration` come from predictions for rows that the heads did not see (`settings.folds` folds; equal queries are
    always in the same fold). The router itself is then fitted on all rows.

    Args:
        options: what is said of the experts, in their order. If each has some examples, they are what the router
            starts from (`Prior`): rows of a few sources teach habits, lines of a person say what is meant.

    Raises:
        RouterError: a domain that is no expert, an expert without enough rows, or fewer than two labels.
        ConfigError: a target that no threshold reaches.
    """
    settings = settings or default_settings(encoder, experts=len(experts))
    prior = _prior(options, experts, encoder, settings)
    labels = _labels(rows, experts, settings.folds)
    with fitting_threads(encoder.device, encoder.hidden_size):
        copies = without_labels(rows)
        both = [*rows, *(row for _, row in copies)]
        lower = in_lower_case(both)
        origin = torch.tensor([*range(len(rows)), *(i for i, _ in copies)])
        origin = torch.cat([origin, origin[torch.tensor([i for i, _ in lower], dtype=torch.int64)]])
        texts = [row.query for row in (*both, *(row for _, row in lower))]
        features = extract(encoder, texts, settings, prior, progress)
        targets = torch.tensor([labels.index(row.domain) for row in rows])
        data = _Data(features, targets[origin], origin, len(both), len(experts))
        heads, calibration = _train(rows, data, settings)
        learnt = Learnt(heads, _kept(data, heads, len(labels), settings), prior)
    provenance = RouterProvenance.of((row.domain for row in rows), data_sha256)
    return EmbeddingRouter(encoder, learnt, experts, settings, calibration, provenance, fallback=fallback)


def _prior(
    options: Sequence[RouteOption], experts: Sequence[str], encoder: TextEncoder, settings: EmbeddingSettings
) -> Prior | None:
    if not options or not says_enough(options):
        return None
    if [option.name for option in options] != list(experts):
        raise RouterError(
            f"options: of {', '.join(o.name for o in options)}, not of {', '.join(experts)} in this order"
        )
    return Prior.of(options, Space(encoder, learnt=settings.tasks))


@dataclass(frozen=True, slots=True)
class _Data:
    """Rows, then copies of them without labels, from `both` on copies in lower case.

    Args:
        targets: [n] int64, `experts` for others.
        origin: [n] int64, the row that each is a copy of.
    """

    features: Features
    targets: Tensor
    origin: Tensor
    both: int
    experts: int


def _train(rows: Sequence[Row], data: _Data, settings: EmbeddingSettings) -> tuple[Heads, ScoreCalibration]:
    """Calibration from held-out predictions, then heads from all rows."""
    count, experts = len(rows), data.experts
    fold, targets = folds(rows, settings.folds, settings.seed), data.targets[: len(rows)]
    which, odds = torch.zeros(count, experts), torch.zeros(count)
    for k in range(settings.folds):
        heads = _fit(data, fold[data.origin] != k, settings)
        unseen = (fold == k).nonzero()[:, 0]
        there = data.features.select(unseen)
        which[unseen] = heads.logits(there, settings.words)
        found = heads.odds(there)
        if found is not None:
            odds[unseen] = found
    heads = _fit(data, torch.ones(len(data.targets), dtype=torch.bool), settings)
    known = targets < experts
    ahead = _offsets(rows, data, which[known], settings)
    heads, which = replace(heads, states=heads.states.scaled(1.0, ahead)), which + ahead
    divisor = temperature(which[known], targets[known]) if experts > 1 else 1.0
    if data.features.prior is not None:
        divisor /= _TRUST
    seen = data.features.select(torch.arange(count))
    best = with_prior(which.double() / divisor, seen, settings).softmax(1).max(1)
    confidence = best.values
    if heads.known is not None and heads.known_words is not None:  # its calibration goes into its weights
        slope, shift = line(odds, known)
        heads = Heads(heads.words, heads.states, heads.known.scaled(slope, shift), heads.known_words * slope)
        confidence = confidence * torch.sigmoid(odds_with_prior(slope * odds.double() + shift, seen, settings))
    return heads, _calibrate(divisor, confidence, best.indices == targets, known, settings)


def _kept(data: _Data, heads: Heads, labels: int, settings: EmbeddingSettings) -> KeptRows:
    """Of rows and their copies without labels: what a query looks like, whoever wrote it."""
    features, first = data.features, slice(data.both)
    words = settings.words * features.words.weighted(heads.words)
    return KeptRows.of(features.states[first], features.known[first], words[first], data.targets[first], labels)


def _labels(rows: Sequence[Row], experts: Sequence[str], folds: int) -> list[str]:
    if OTHER in experts:
        raise RouterError(f"expert.name: {OTHER!r} means 'no expert' in routing data; rename the expert")
    queries: dict[str, set[str]] = {}
    for row in rows:
        queries.setdefault(row.domain, set()).add(plain(row.query))
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


def _offsets(rows: Sequence[Row], data: _Data, near: Tensor, settings: EmbeddingSettings) -> Tensor:
    """[experts] float32, see `meswitch.router.train`; near: held-out logits of the experts' rows."""
    targets = data.targets[: len(rows)]
    numbers = {row.domain: int(target) for row, target in zip(rows, targets, strict=True)}
    sources = {domain: names for domain, names in sources_of(rows).items() if numbers[domain] < data.experts}
    free = torch.zeros(data.experts, dtype=torch.bool)
    if len(sources) < 2:  # one alone would only be ahead of experts of which nothing is known
        return torch.zeros(data.experts)
    bare = torch.arange(len(rows))  # each row as it is without its label: a new source has none
    bare[data.origin[len(rows) : data.both]] = torch.arange(len(rows), data.both)
    far: list[Tensor] = []
    groups: list[Tensor] = []
    for domain, name in [(domain, name) for domain, names in sources.items() for name in names]:
        free[numbers[domain]] = True
        out = torch.tensor([row.domain == domain and row.source == name for row in rows])
        words, states = _which(data, ~out[data.origin], settings)
        there = data.features.select(bare[out])
        far.append(settings.words * there.words.weighted(words) + states(there.states))
        groups.append(torch.full((len(there.states),), len(groups)))
    order = [i for domain, names in sources.items() for i in [numbers[domain]] * len(names)]
    group = torch.cat(groups)
    return offsets(near, targets[targets < data.experts], torch.cat(far), torch.tensor(order)[group], group, free)


def _fit(data: _Data, chosen: Tensor, settings: EmbeddingSettings) -> Heads:
    """Heads from the rows `chosen` [n] bool and the copies among them."""
    experts = data.experts
    words, states = _which(data, chosen, settings)
    if not bool((data.targets == experts).any()):
        return Heads(words, states, None, None)
    # Where style counts, copies that lack it would teach the head to ignore it.
    every = (chosen if settings.lower else chosen & (torch.arange(len(chosen)) < data.both)).nonzero()[:, 0]
    all_, is_known = data.features.select(every), (data.targets[every] < experts).long()
    both = _linear(all_.known, is_known, 2, settings.l2)
    weight, bias = both.weight[:, 1:] - both.weight[:, :1], both.bias[1:] - both.bias[:1]
    counted = naive_bayes(all_.words, is_known, 2, settings.buckets, settings.smoothing)
    return Heads(words, states, Linear(both.mean, both.scale, weight, bias), counted[:, 1:] - counted[:, :1])


def _which(data: _Data, chosen: Tensor, settings: EmbeddingSettings) -> tuple[Tensor, Linear]:
    """The heads that choose the expert: of words and of states."""
    some = (chosen & (data.targets < data.experts)).nonzero()[:, 0]
    own, mine = data.features.select(some), data.targets[some]
    words = naive_bayes(own.words, mine, data.experts, settings.buckets, settings.smoothing)
    return words, _linear(own.states, mine, data.experts, settings.l2, evenness=1.0)


def _linear(x: Tensor, targets: Tensor, classes: int, l2: float, evenness: float = 0.5) -> Linear:
    mean = x.mean(0)
    # 1/sqrt(width): the same l2 then means the same for models of any width.
    scale = 1 / (x.std(0).clamp_min(1e-3) * max(1, x.shape[1]) ** 0.5)
    return Linear(mean, scale, *logistic((x - mean) * scale, targets, classes, l2, evenness))


def _calibrate(
    divisor: float, confidence: Tensor, right: Tensor, known: Tensor, settings: EmbeddingSettings
) -> ScoreCalibration:
    """Threshold and figures from held-out confidences [n]; right: whether the best expert is the row's."""
    correct = right[known]
    return ScoreCalibration(
        temperature=divisor,
        threshold=choose_threshold(
            confidence, right, known, precision=settings.target_precision, coverage=settings.target_coverage
        ),
        accuracy=float(correct.double().mean()),
        ece=calibration_error(confidence[known], correct),
        auroc=auroc(confidence[known], confidence[~known]),
    )


def add_experts(router: EmbeddingRouter, rows: Sequence[Row]) -> EmbeddingRouter:
    """The router with the experts of `rows`, which it does not know yet, behind its own.

    Its threshold, temperature and figures stay what they were: they say nothing about the new experts.

    Raises:
        RouterError: no rows, rows of a label that the router has, or too few of a new one.
    """
    examples: dict[str, list[str]] = {}
    for row in rows:
        examples.setdefault(row.domain, []).append(row.query)
    if not examples:
        raise RouterError("examples: none; give rows of the new experts")
    return add_described(router, [RouteOption(name, "", tuple(queries)) for name, queries in examples.items()])


def add_described(router: EmbeddingRouter, options: Sequence[RouteOption]) -> EmbeddingRouter:
    """The router with experts of which there are a few examples, and perhaps a description; see `add_experts`.

    Raises:
        RouterError: see `add_experts`.
    """
    for option in options:
        lines = {line for line in (*option.examples, option.description) if line}
        if option.name in (*router.experts, OTHER):
            raise RouterError(f"domain: {option.name!r} is known to the router; examples can only add experts")
        if len(lines) < LEAST_EXAMPLES:
            raise RouterError(
                f"examples: {option.name!r} has {len(lines)} different ones (a description counts as one); "
                f"at least {LEAST_EXAMPLES} are needed"
            )
    for option in options:
        router = _with_expert(router, option)
    return router


def _with_expert(router: EmbeddingRouter, option: RouteOption) -> EmbeddingRouter:
    settings, prior = router.settings, router.prior
    name, queries = option.name, [line for line in (*option.examples, option.description) if line]
    with fitting_threads(router.encoder.device, router.encoder.hidden_size):
        seen = extract(router.encoder, queries, settings)
        heads = _heads(router.heads, router.learnt.rows, seen, settings.words, _FIRMNESS * settings.l2)
    if prior is not None:
        # The prior puts it where its lines are; only the heads of the others know what their queries are like.
        prior = Prior.of([*prior.options, option], prior.space)
        bias = torch.zeros(len(prior.options))
        bias[-1] = -_MODESTY * router.calibration.temperature
        heads = replace(heads, states=heads.states.scaled(1.0, bias))
    rows = Counter(router.provenance.rows)
    rows[name] += len(queries)
    return EmbeddingRouter(
        router.encoder,
        Learnt(heads, router.learnt.rows.with_expert(seen.states, seen.known), prior, router.learnt.added + 1),
        (*router.experts, name),
        settings,
        router.calibration,
        replace(router.provenance, rows=dict(sorted(rows.items()))),
        fallback=router.fallback,
        threshold=router.threshold,
    )


def _heads(heads: Heads, memory: KeptRows, seen: Features, share: float, l2: float) -> Heads:
    """share: the word head's weight beside the states'."""
    experts, targets = heads.words.shape[1], memory.targets()
    nothing = torch.zeros(len(heads.words), 1)
    old = targets < experts
    rows = torch.cat([memory.states[old], seen.states])
    words = torch.cat([memory.words[old], share * seen.words.weighted(heads.words)])
    labels = torch.cat([targets[old], torch.full((len(seen.states),), experts)])
    states = _choice(heads.states, rows, words, labels, l2)
    if heads.known is None or heads.known_words is None:
        return Heads(torch.cat([heads.words, nothing], 1), states, None, None)
    known = _membership(heads.known, memory.known[~old], seen.known, l2)
    return Heads(torch.cat([heads.words, nothing], 1), states, known, torch.cat([heads.known_words, nothing], 1))


def _choice(head: Linear, rows: Tensor, words: Tensor, labels: Tensor, l2: float) -> Linear:
    """One more column of the head that chooses, every expert weighing the same."""
    old, x = head(rows) + words, (rows - head.mean) * head.scale
    weight = 1 / torch.bincount(labels)[labels].float()

    def loss(column: Tensor, bias: Tensor) -> Tensor:
        logits = torch.cat([old, (x @ column + bias)[:, None]], 1)
        return (weight * cross_entropy(logits, labels, reduction="none")).sum() / weight.sum()

    return _widened(head, *_fitted(loss, x.shape[1], l2))


def _membership(head: Linear, others: Tensor, examples: Tensor, l2: float) -> Linear:
    """One more column of the head that tells others: like the new expert's examples, or like others."""
    inside, outside = ((rows - head.mean) * head.scale for rows in (examples, others))

    def loss(column: Tensor, bias: Tensor) -> Tensor:
        return (softplus(-(inside @ column + bias)).mean() + softplus(outside @ column + bias).mean()) / 2

    return _widened(head, *_fitted(loss, inside.shape[1], l2))


def _fitted(loss: Callable[[Tensor, Tensor], Tensor], width: int, l2: float) -> tuple[Tensor, Tensor]:
    """Column [width] and bias [1] of the least loss + l2 x the sum of squared weights, by L-BFGS from zero."""
    column, bias = torch.zeros(width, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([column, bias], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(column, bias) + l2 * column.square().sum()
        value.backward()
        return value

    optimizer.step(step)
    return column.detach(), bias.detach()


def _widened(head: Linear, column: Tensor, bias: Tensor) -> Linear:
    return replace(head, weight=torch.cat([head.weight, column[:, None]], 1), bias=torch.cat([head.bias, bias]))

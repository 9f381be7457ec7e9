"""An expert of which there are only a few examples, added to a trained router without its training data.

The new expert gets a column of its own in both heads, fitted on its examples against the rows that the router has kept
(`Memory`), while all other columns stay as they are: among the experts there were, nothing changes but that the new
one may take a query. Its words count for nothing, because a few examples say too little about words.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from meswitch.router.base import OTHER, RouterError
from meswitch.router.data import Row
from meswitch.router.described import Prior, RouteOption
from meswitch.router.embedding import EmbeddingRouter, Features, Heads, Linear, Memory, extract
from meswitch.threads import fitting_threads

LEAST = 5  # different examples

_FIRMNESS = 2.5  # times the router's own penalty on weights, because there are fewer rows


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
        if len(lines) < LEAST:
            raise RouterError(
                f"domain: {option.name!r} has {len(lines)} distinct examples; at least {LEAST} are needed"
            )
    for option in options:
        router = _with_expert(router, option)
    return router


def _with_expert(router: EmbeddingRouter, option: RouteOption) -> EmbeddingRouter:
    settings, prior = router.settings, router.prior
    name, queries = option.name, [line for line in (*option.examples, option.description) if line]
    with fitting_threads(router.encoder.device, router.encoder.hidden_size):
        seen = extract(router.encoder, queries, settings)
        heads = _heads(router.heads, router.memory, seen, settings.words, _FIRMNESS * settings.l2)
    if prior is not None:
        prior = Prior.of([*prior.options, option], prior.space)
    rows = Counter(router.provenance.rows)
    rows[name] += len(queries)
    return EmbeddingRouter(
        router.encoder,
        heads,
        (*router.experts, name),
        settings,
        router.calibration,
        replace(router.provenance, rows=dict(sorted(rows.items()))),
        memory=router.memory.with_expert(seen.states, seen.known),
        prior=prior,
        added=router.added + 1,
        fallback=router.fallback,
        threshold=router.threshold,
    )


def _heads(heads: Heads, memory: Memory, seen: Features, share: float, l2: float) -> Heads:
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

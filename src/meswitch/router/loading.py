"""A family's router: the trained one, grown by new experts; or one by what the family says of its experts.

A new expert needs a few examples and no training data: it gets a column of its own in both heads of an embedding
router, fitted on its examples against the rows that the router has kept (`KeptRows`). All other columns stay as they
are: among the experts there were, nothing changes but that the new one may take a query. Its words count for nothing,
because a few examples say too little about words."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.cpu import fitting_threads
from meswitch.router.base import OTHER, Router, RouterError
from meswitch.router.data import Row
from meswitch.router.described import DescribedRouter, Prior, RouteOption, Space, check_options
from meswitch.router.embedding import EmbeddingRouter, Features, Heads, KeptRows, Learnt, Linear, RouterFile, extract
from meswitch.router.encoder import Encoder, open_encoder
from meswitch.router.store import JSON_NAME, OpenOptions, check_experts, open_kind, read_file


def open_family_router(
    path: str | Path,
    options: Sequence[RouteOption],
    given: OpenOptions,
    *,
    encoder: str | Path | None = None,
    bits: int = 32,
) -> Router:
    """A family's router: the trained one if there is one, otherwise one by what the family says of its experts.

    An expert that a trained embedding router does not know is added to it by its examples and description.

    Args:
        path: where a trained router would be.
        options: the family's experts.
        given: the base, who answers when the router abstains, and what is loaded already.
        encoder: of a router by descriptions; None: the base.
        bits: of that encoder's linear layers, 32 or 8.

    Raises:
        RouterError: no trained router and an expert of which nothing is said; or see `load_router`.
    """
    directory = Path(path)
    names = [option.name for option in options]
    if not is_trained(directory):
        check_described(directory, options)
        space = Space(_encoder(encoder, bits, given))
        return DescribedRouter(options, space, fallback=given.fallback, threshold=given.threshold)
    file = read_file(directory)
    new = [option for option in options if option.name not in file.experts]
    sayings = all(option.examples for option in new)
    grows = isinstance(file, RouterFile) and new and sayings and {*file.experts} <= {*names}
    if not grows:
        check_experts(directory, file, names)
    router = open_kind(directory, file, given)
    return add_described(router, new) if isinstance(router, EmbeddingRouter) and grows else router


def is_trained(directory: Path) -> bool:
    """Whether a router was written here, whole or damaged."""
    return (directory / JSON_NAME).exists()


def check_described(directory: Path, options: Sequence[RouteOption]) -> None:
    """Can these experts be told apart without the trained router that `directory` has not?

    Raises:
        RouterError: says what is missing, and both ways to mend it.
    """
    bare = [option.name for option in options if not option.description.strip() and not option.examples]
    if bare or not options:
        missing = ", ".join(repr(name) for name in bare) or "any expert"
        raise RouterError(
            f"{directory}: no router here, and nothing is said of {missing}; give every [[expert]] of family.toml a "
            "`description` and `examples`, or make a router with `meswitch router train --family F --data rows.jsonl`"
        )
    check_options(options)


def _encoder(source: str | Path | None, bits: int, given: OpenOptions) -> Any:
    if source is not None:
        return open_encoder(source, given.device, bits)
    if given.model is not None:
        return Encoder(given.model, given.tokenizer, fingerprint(Checkpoint.open(given.base)))
    return Encoder.load(given.base, given.device)


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
        heads = _heads(router.heads, router.learnt.rows, seen, settings.words, _FIRMNESS * settings.l2)
    if prior is not None:
        prior = Prior.of([*prior.options, option], prior.space)
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

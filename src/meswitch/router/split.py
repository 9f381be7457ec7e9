"""Rows kept apart for calibration and figures: the same share of every domain and source, equal queries together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from meswitch.router.base import RouterError
from meswitch.router.data import Row
from meswitch.router.leakage import normal


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows held out); the same seed gives the same split.

    Queries that are equal but for case, spaces, digits' places and punctuation are on the same side. A source with
    few different queries stays whole on the training side.

    Raises:
        RouterError: nothing is left on one side.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(normal(row.query), []).append(row)
    strata: dict[tuple[str, str], list[list[Row]]] = {}
    for group in groups.values():
        strata.setdefault((group[0].domain, group[0].source), []).append(group)
    generator = torch.Generator().manual_seed(seed)
    seen: list[Row] = []
    held_out: list[Row] = []
    for key in sorted(strata):
        members = strata[key]
        count = round(len(members) * share)
        for place, which in enumerate(torch.randperm(len(members), generator=generator).tolist()):
            (held_out if place < count else seen).extend(members[which])
    if not seen or not held_out:
        raise RouterError(f"data: {len(rows)} rows leave none to train on or none to calibrate on; give more")
    return seen, held_out


def plain(query: str) -> str:
    """A query but for case and spaces."""
    return " ".join(query.lower().split())


def folds(rows: Sequence[Row], count: int, seed: int) -> Tensor:
    """[n] int64: each row's fold. Every domain is spread evenly, and equal queries stay together."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(plain(row.query), []).append(i)
    by_domain: dict[str, list[list[int]]] = {}
    for group in groups.values():
        by_domain.setdefault(rows[group[0]].domain, []).append(group)
    generator = torch.Generator().manual_seed(seed)
    fold = torch.zeros(len(rows), dtype=torch.int64)
    for domain in sorted(by_domain):
        members = by_domain[domain]
        for place, which in enumerate(torch.randperm(len(members), generator=generator).tolist()):
            fold[members[which]] = place % count
    return fold

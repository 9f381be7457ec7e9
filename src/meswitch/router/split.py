"""Rows kept apart for calibration and figures: the same share of every domain and source, equal queries together."""

from collections.abc import Sequence

import torch

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

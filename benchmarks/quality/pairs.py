"""The default against every baseline on the same questions and texts, from stored outcomes.

Ours is compared with a baseline's best point of at most our bytes, and with the baseline point of the next more bytes.
Best is the most right answers, then the lowest KL. Right answers are compared by McNemar's exact test, KL by a sign
test over the texts: on how many ours is nearer to the full expert, on how many the baseline is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.quality.settings import Setting
from benchmarks.quality.store import Store
from meswitch.evaluate import Comparison, Score, compare

OURS = "me-switch"
LEAST, MOST = 1.0, 4.0  # the byte budgets that count, in bits per weight
CHANCE = 0.05  # a difference less likely than this by chance is called one


class Point(NamedTuple):
    """One setting of one expert."""

    setting: Setting
    expert: str
    job: dict[str, Any]

    @property
    def bits(self) -> float:
        return self.job["bits_per_weight"]

    @property
    def rank(self) -> tuple[int, float]:
        """The better, the larger."""
        return self.job.get("correct", 0), -self.job["kl"]

    @property
    def name(self) -> str:
        return f"{self.setting.group}, {self.setting.label}"


def points(store: Store, expert: str) -> list[Point]:
    """All finished settings of an expert, smallest first."""
    found = [
        Point(setting, expert, store.found(setting)[expert])
        for setting in store.settings
        if expert in store.found(setting)
    ]
    return sorted(found, key=lambda point: (point.bits, point.name))


@dataclass(frozen=True)
class Pair:
    """Ours against one baseline point; of a `Comparison`, `lost` is what only ours got right or is nearer on."""

    ours: Point
    theirs: Point
    right: Comparison | None  # None where answers cannot be checked
    kl: Comparison

    @property
    def kl_lead(self) -> float:
        return self.theirs.job["kl"] - self.ours.job["kl"]

    @property
    def behind(self) -> list[str]:
        """In what the baseline is ahead beyond chance."""
        found = []
        if self.right is not None and self.right.gained > self.right.lost and self.right.p_value < CHANCE:
            found.append("right answers")
        if self.kl_lead < 0 and self.kl.gained > self.kl.lost and self.kl.p_value < CHANCE:
            found.append("KL")
        return found


def pair(store: Store, ours: Point, theirs: Point) -> Pair:
    scores = [store.score(point.job.get("outcomes"), point.expert) for point in (ours, theirs)]
    right = compare(*scores) if scores[0] is not None and scores[1] is not None else None
    return Pair(ours, theirs, right, nearer(ours.job["kl_by_text"], theirs.job["kl_by_text"]))


def nearer(first: list[float], second: list[float]) -> Comparison:
    """Sign test: `lost` are the texts on which the first has the lower KL, `gained` those of the second."""
    return compare(
        Score("texts", 0, tuple(a < b for a, b in zip(first, second, strict=True))),
        Score("texts", 0, tuple(b < a for a, b in zip(first, second, strict=True))),
    )


def our_points(store: Store) -> Iterator[tuple[Point, list[Point]]]:
    """Each of our points within the budgets, with all baseline points of its expert."""
    for expert in store.experts:
        found = points(store, expert)
        theirs = [point for point in found if point.setting.group != OURS]
        for point in found:
            if point.setting.group == OURS and LEAST <= point.bits <= MOST:
                yield point, theirs


def against_best(store: Store) -> Iterator[tuple[Point, Pair | None, Pair | None]]:
    """Ours, against the best baseline of at most its bytes, and against that of the next more bytes."""
    for ours, theirs in our_points(store):
        within = [point for point in theirs if point.bits <= ours.bits]
        beyond = [point for point in theirs if point.bits > ours.bits]
        best = max(within, key=lambda point: point.rank, default=None)
        above = min(beyond, key=lambda point: point.bits, default=None)
        yield ours, best and pair(store, ours, best), above and pair(store, ours, above)


def against_each(store: Store) -> Iterator[Pair]:
    """Ours, against the best point of every baseline method of at most its bytes."""
    for ours, theirs in our_points(store):
        for method in dict.fromkeys(point.setting.group for point in theirs):
            within = [point for point in theirs if point.setting.group == method and point.bits <= ours.bits]
            if within:
                yield pair(store, ours, max(within, key=lambda point: point.rank))

"""Queries that are in two data sets, or twice in one: equal, equal but for form, or nearly so.

Near duplicates are found by their shingles: queries that share most runs of `SHINGLE` words differ in a name or a
number, and a router that has seen one has seen the other. Candidates come from an index of the rarer shingles, so the
comparison is near linear in the number of rows.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from meswitch.router.data import Row

SHINGLE = 3  # words
NEAR = 0.7  # Jaccard similarity of two queries' shingles from which they count as near duplicates
_COMMON = 200  # a shingle in more rows than this proposes no candidates: it is a form, not a query


@dataclass(frozen=True, slots=True)
class Leakage:
    """Rows of the second data set that the first one has too.

    exact, normalised, near: indices into the second; each row is counted once, in the first kind that fits.
    conflicts: how many of them have another domain there.
    """

    exact: tuple[int, ...]
    normalised: tuple[int, ...]
    near: tuple[int, ...]
    conflicts: int

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(sorted((*self.exact, *self.normalised, *self.near)))

    def counts(self) -> dict[str, int]:
        return {
            "exact": len(self.exact),
            "normalised": len(self.normalised),
            "near": len(self.near),
            "conflicts": self.conflicts,
        }


def find_leakage(train: Sequence[Row], held_out: Sequence[Row], near: float = NEAR) -> Leakage:
    """Which rows of `held_out` are in `train`?"""
    index = _Index(train)
    found: dict[str, list[int]] = {"exact": [], "normalised": [], "near": []}
    conflicts = 0
    for i, row in enumerate(held_out):
        match = index.match(row.query, near)
        if match is not None:
            kind, other = match
            found[kind].append(i)
            conflicts += train[other].domain != row.domain
    return Leakage(tuple(found["exact"]), tuple(found["normalised"]), tuple(found["near"]), conflicts)


def drop_duplicates(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Rows whose normalised query comes for the first time, and how many were left out."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(normal(row.query), row)
    return list(first.values()), len(rows) - len(first)


def normal(query: str) -> str:
    """A query without what does not change it: case, spaces, punctuation at the words' edges, Unicode's variants."""
    text = unicodedata.normalize("NFKC", query).casefold()
    words = (word.strip(".,;:!?\"'()[]{}`*_") for word in text.split())
    return " ".join(word for word in words if word) or text.strip()


def shingles(query: str) -> frozenset[str]:
    """Runs of `SHINGLE` words; a shorter query is one shingle."""
    words = re.findall(r"\w+", normal(query))
    if len(words) <= SHINGLE:
        return frozenset([" ".join(words)])
    return frozenset(" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1))


class _Index:
    """Looks queries up among rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._exact = {row.query: i for i, row in reversed(list(enumerate(rows)))}
        self._normal = {normal(row.query): i for i, row in reversed(list(enumerate(rows)))}
        self._sets = [shingles(row.query) for row in rows]
        self._rows_of: defaultdict[str, list[int]] = defaultdict(list)
        for i, held in enumerate(self._sets):
            for shingle in held:
                self._rows_of[shingle].append(i)

    def match(self, query: str, near: float) -> tuple[str, int] | None:
        """(kind, row) of the closest row that counts as the same."""
        if query in self._exact:
            return "exact", self._exact[query]
        key = normal(query)
        if key in self._normal:
            return "normalised", self._normal[key]
        mine = shingles(query)
        shared: Counter[int] = Counter()
        for shingle in mine:
            rows = self._rows_of.get(shingle, ())
            if len(rows) <= _COMMON:
                shared.update(rows)
        best, best_row = 0.0, -1
        for row in sorted(shared):
            theirs = self._sets[row]
            common = len(mine & theirs)
            similarity = common / (len(mine) + len(theirs) - common)
            if similarity > best:
                best, best_row = similarity, row
        return ("near", best_row) if best >= near else None

"""Copies of training rows without what gives their domain away for the wrong reason.

Data sets have habits that traffic does not share: one writes "Write a SQL query: " before its questions, another is
all in lower case. A head that learns the habit is right on that data set and lost elsewhere. Measured by leaving
sources out; the copies are used for training only, never for calibration or figures.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from meswitch.router.data import Row

_LABEL = re.compile(r"([^:\n]{3,40}):\s+(?=\S)")  # "Write a SQL query: ...", "Question: ..."
_ASKING = re.compile(
    r"(?:are|can|could|did|do|does|has|have|how|is|may|should|was|were|wh\w+|will|would)\b"  # wh: what, when, who ...
)
_SHARE = 0.05  # of a domain's rows that open alike: a habit


def without_labels(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """(index of the row, the row without its opening label) where many rows of the domain open with that label."""
    found = [_LABEL.match(row.query) for row in rows]
    sizes = Counter(row.domain for row in rows)
    labels = Counter((row.domain, match[1]) for row, match in zip(rows, found, strict=True) if match)
    return [
        (i, replace(row, query=row.query[match.end() :]))
        for i, (row, match) in enumerate(zip(rows, found, strict=True))
        if match and labels[row.domain, match[1]] >= max(5, _SHARE * sizes[row.domain])
    ]


def in_lower_case(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """(index of the row, the row in lower case without its final mark), of those that are not written so."""
    plain = [replace(row, query=row.query.lower().rstrip().rstrip("?.!")) for row in rows]
    return [(i, copy) for i, (row, copy) in enumerate(zip(rows, plain, strict=True)) if copy != row and copy.query]


def as_sentences(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """(index of the row, the row with a capital and a final mark), of those that have neither."""
    found = []
    for i, row in enumerate(rows):
        text = row.query.strip()
        if text and text == text.lower() and text[-1].isalnum():
            mark = "?" if _ASKING.match(text) else "."
            found.append((i, replace(row, query=re.sub(r"\bi\b", "I", text[0].upper() + text[1:]) + mark)))
    return found


def disguises(rows: Sequence[Row]) -> list[list[Row]]:
    """For each row its copies without habits: without a label, and both in the other way of writing."""
    bare = without_labels(rows)
    both = [*enumerate(rows), *bare]
    copies: list[list[Row]] = [[] for _ in rows]
    for i, row in bare:
        copies[i].append(row)
    for vary in (in_lower_case, as_sentences):
        for place, row in vary([row for _, row in both]):
            copies[both[place][0]].append(row)
    return copies

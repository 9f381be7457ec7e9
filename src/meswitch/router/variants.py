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

"""Routing data: JSON lines of `{"query": ..., "domain": ..., "source": ...}`."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch.router.base import OTHER, RouterError
from meswitch.textfile import json_kind, read_json_lines


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled query. domain: an expert's name, or `other`. source: where it comes from, for the figures."""

    query: str
    domain: str
    source: str = "unknown"


def read_rows(path: str | Path, experts: Collection[str]) -> list[Row]:
    """Read and check a data file; fields beyond the three are ignored, `source` may be left out.

    Raises:
        RouterError: no such file, no rows, or a line that is not such a row; names the file, line and field.
    """
    file = Path(path)
    found = read_json_lines(file, RouterError)
    rows = [_row(value, f"{file}: line {number}", experts) for number, value in found]
    if not rows:
        raise RouterError(f"{file}: has no rows; give JSON lines with query, domain and source")
    return rows


def _row(data: Any, where: str, experts: Collection[str]) -> Row:
    if not isinstance(data, dict):
        raise RouterError(f"{where}: expected an object with query, domain and source, found {json_kind(data)}")
    fields = {"source": "unknown"} | {name: data[name] for name in ("query", "domain", "source") if name in data}
    for name in ("query", "domain", "source"):
        if name not in fields:
            raise RouterError(f'{where}: {name}: missing; a row is {{"query": ..., "domain": ..., "source": ...}}')
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise RouterError(f"{where}: {name}: expected a text that is not empty, found {fields[name]!r:.40}")
    if fields["domain"] != OTHER and fields["domain"] not in experts:
        known = ", ".join(experts) or "none"
        raise RouterError(
            f"{where}: domain: {fields['domain']!r} is no expert of the family ({known}); "
            f"correct it, or use {OTHER!r} for queries that no expert is for"
        )
    return Row(**fields)

"""Amounts for people: bytes ('8GiB' -> int, int -> '1.75 GB'), counts, and how much of some work is done."""

import re
from collections.abc import Callable

from meswitch.errors import ConfigError

_UNITS = {"": 1, "B": 1}
for _i, _p in enumerate("KMGT", start=1):
    _UNITS |= {f"{_p}B": 1000**_i, f"{_p}iB": 1024**_i}


def parse_bytes(text: str) -> int:
    """`'512MiB'`, `'8 GB'` or `'1000'` as a number of bytes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match.group(2) not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; write it like 512MiB, 8GB or 1000000")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def format_bytes(count: float) -> str:
    """Decimal units, three significant digits: `1.75 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def plural(count: int | str, noun: str) -> str:
    """`1 bit`, `2 bits`; a word in the place of the number is taken for many."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# (phase, done, in all, what is being done); done and in all count what takes time: parameters, tokens, steps, bytes
Progress = Callable[[str, int, int, str], None]


def silent(phase: str, done: int, total: int, what: str) -> None:
    """A `Progress` that tells nobody."""

"""The four experts: how each is trained, what its data are, and when an answer is right."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from meswitch.durable import write_text

Item = TypeVar("Item")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a data file: `q`, the user's turn, and `a`, the answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """One expert's recipe.

    max_new_tokens: of an answer. is_right: from an answer and the wanted one; None where there is no exact check.
    """

    epochs: float
    learning_rate: float
    max_new_tokens: int = 0
    is_right: Callable[[str, str], bool] | None = None


def last_number(text: str) -> float | None:
    """The last number in a text; commas between digits do not count."""
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def same_number(answer: str, wanted: str) -> bool:
    """Whether the last number is the wanted one."""
    found, right = last_number(answer), last_number(wanted)
    return found is not None and right is not None and abs(found - right) < 1e-4


def same_text(answer: str, wanted: str) -> bool:
    """Whether the texts are equal, however much white space there is between words."""
    return answer.split() == wanted.split()


TASKS: dict[str, Task] = {
    "math": Task(3, 1e-4, 256, same_number),
    "sql": Task(4, 1e-4, 560, same_text),
    "intent": Task(2, 1e-4, 12, same_text),
    "instruct": Task(2, 5e-5),
}


def read_rows(file: Path) -> list[Row]:
    """The rows of a data file, in their order."""
    with file.open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines if line.strip()]
    return [Row(row["q"], str(row["a"])) for row in found]


def spread(rows: Sequence[Item], count: int | None) -> list[Item]:
    """So many rows, evenly from all: files are often sorted by source."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def write_calibration(rows: Sequence[Row], file: Path, seed: int = 0) -> None:
    """Training rows as chat messages, shuffled, since `meswitch.compress` reads from the file's start."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    turns = [[{"role": "user", "content": row.question}, {"role": "assistant", "content": row.answer}] for row in order]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps({"messages": messages}) + "\n" for messages in turns))

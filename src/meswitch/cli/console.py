"""What all commands share: results go to stdout, everything else to stderr."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from meswitch.errors import ConfigError
from meswitch.units import Progress

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH_OF_A_FILE = 120  # columns of a table that is piped or redirected


def debugging() -> bool:
    """Whether MESWITCH_DEBUG asks for tracebacks and for what the libraries print."""
    return os.environ.get("MESWITCH_DEBUG", "") not in ("", "0")


def quiet() -> None:
    """Keep transformers' progress bars and warnings away; call it where a command starts to load models."""
    if debugging():
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(torch|transformers)\.")


def check_device(name: str) -> str:
    """A `--device` that torch has here.

    Raises:
        ConfigError: it is neither cpu nor cuda, or there is no GPU.
    """
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"--device: {name!r} is neither cpu nor cuda")
    if name != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(f"--device: {name!r}: torch sees no GPU here; use cpu")
    return name


def note(line: str) -> None:
    """One line for the person, on stderr."""
    typer.echo(line, err=True)


def fail(message: str) -> None:
    """An error on stderr, `error:` in red on a terminal; one line for each line of the message."""
    for line in message.splitlines() or [""]:
        typer.echo(typer.style("error: ", fg=typer.colors.RED, bold=True) + line, err=True)


def print_json(data: Any) -> None:
    """A result for programs, on stdout."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def table(title: str, *columns: str) -> "Table":
    """An empty table: the first column to the left, the others (numbers) to the right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if index else "left", overflow="fold")
    return made


def pairs(title: str, rows: dict[str, str]) -> "Table":
    """A table of names and their values."""
    made = table(title, "", "")
    made.show_header = False
    made.columns[1].justify = "left"
    for name, value in rows.items():
        made.add_row(name, value)
    return made


def show(*renderables: Any) -> None:
    """Tables and lines on stdout."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE, highlight=False, markup=False)
    for item in renderables:
        console.print(item)


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """Shows on stderr how far work is and what is left: a bar on a terminal, elsewhere a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    console, timing = Console(stderr=True), Timing()
    if not console.is_terminal:
        lines = Lines(label, note)
        yield lines
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[time]}", markup=False),
        TextColumn("{task.fields[what]}", style="dim", markup=False),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(label, total=None, time="", what="")

        def tell(phase: str, done: int, total: int, what: str) -> None:
            timing.update(phase, done, total)
            bars.update(
                task, description=f"{label}: {phase}", completed=done, total=total, time=timing.text(), what=what
            )

        yield tell


class Timing:
    """When a phase began, how far it was then, and how long the rest will take at its pace so far.

    Args:
        clock: seconds, as `time.monotonic` gives them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.phase: str | None = None
        self.started = self.now = clock()
        self.first = self.done = self.total = 0

    def update(self, phase: str, done: int, total: int) -> None:
        self.now = self.clock()
        if phase != self.phase:
            self.phase, self.started, self.first = phase, self.now, done
        self.done, self.total = done, total

    @property
    def elapsed(self) -> float:
        return self.now - self.started

    @property
    def left(self) -> float | None:
        """Seconds; None while there is nothing to tell it from. What an earlier run did says nothing about pace."""
        did = self.done - self.first
        return self.elapsed * (self.total - self.done) / did if did > 0 and self.elapsed >= 1 else None

    def text(self) -> str:
        left = "" if self.left is None else f", about {duration(self.left)} left"
        return f"{duration(self.elapsed)}{left}"


class Lines:
    """Progress as lines: at least 10 seconds apart, and one whenever 5 % more are done or a minute has passed.

    Args:
        write: is given each line. clock: as of `Timing`.
    """

    _APART, _LONGEST, _SHARE = 10.0, 60.0, 0.05

    def __init__(self, label: str, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.label, self.write, self.timing = label, write, Timing(clock)
        self.told_at, self.told_share = self.timing.now, 0.0

    def __call__(self, phase: str, done: int, total: int, what: str) -> None:
        timing = self.timing
        if phase != timing.phase:
            self.told_share = 0.0
        timing.update(phase, done, total)
        share, since = done / max(1, total), timing.now - self.told_at
        if since >= self._LONGEST or (since >= self._APART and share >= self.told_share + self._SHARE):
            self.told_at, self.told_share = timing.now, share
            self.write(f"{self.label}: {phase}, {share:.0%}, {timing.text()} ({what})")


def duration(seconds: float) -> str:
    """`8 s`, `4 min 10 s`, `2 h 5 min`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

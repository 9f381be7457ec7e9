"""What all commands share: results go to stdout, everything else to stderr."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from meswitch.errors import ConfigError

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
def tensor_progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, if that is a terminal; yields the callback (tensors done, in all, name of the last)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[tensor]}", style="dim", markup=False),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None, tensor="")

        def advance(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, tensor=name)

        yield advance

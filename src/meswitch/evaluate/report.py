"""What an evaluation found, as JSON, Markdown or a table for the terminal."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table

from meswitch.evaluate.accuracy import Score
from meswitch.evaluate.fidelity import Fidelity
from meswitch.evaluate.gain import Comparison, GainRetained
from meswitch.version import __version__

Kind = Literal["base", "expert", "delta"]
HEADINGS = ("task", "model", "accuracy", "gain retained", "bpw", "KL", "top-1", "lost/gained")
NOTES = (
    "in brackets: 95 % intervals; gain retained = (compressed - base) / (expert - base), both on the same questions; "
    "bpw = bits per weight, all bytes of the artifact x 8 / all parameters of the expert; "
    "KL (nats a token) and top-1 agreement are against the full expert, on its own answers; "
    "lost/gained = questions that only the full expert / only this model answered right, with McNemar's exact p."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One model on one task; None where it was not measured or means nothing (gain of the base, say)."""

    task: str
    model: str
    kind: Kind
    path: str
    expert: str | None = None  # the full expert that fidelity, gain and comparison are against
    score: Score | None = None
    fidelity: Fidelity | None = None
    gain: GainRetained | None = None
    comparison: Comparison | None = None
    bits_per_weight: float | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, one cell for each of `HEADINGS`, of one or two lines."""
        score, fidelity, gain, pairs = self.score, self.fidelity, self.gain, self.comparison
        retained = None if gain is None or gain.value is None else _with_interval(gain.value, gain.interval)
        return (
            self.task,
            self.model if self.kind == "base" else f"{self.model}\n{self.kind}",
            _with_interval(score.accuracy, score.interval) if score else "-",
            retained or "-",
            f"{self.bits_per_weight:.3f}" if self.bits_per_weight is not None else "-",
            f"{fidelity.kl:.4f}" if fidelity else "-",
            f"{fidelity.top1:.4f}" if fidelity else "-",
            f"{pairs.lost}/{pairs.gained}\np={pairs.p_value:.1g}" if pairs else "-",
        )

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON; `outcomes` is a string of 1 (right) and 0, in the order of `draw`."""
        data = asdict(self)
        if self.score is not None:
            data["score"] = {
                "seed": self.score.seed,
                "correct": self.score.correct,
                "total": self.score.total,
                "accuracy": self.score.accuracy,
                "interval": self.score.interval,
                "outcomes": "".join("01"[right] for right in self.score.outcomes),
            }
        return data


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of one evaluation, ordered by task, then base, expert, deltas."""

    rows: tuple[Row, ...]
    n: int
    seed: int

    def get(self, model: str, task: str, kind: Kind | None = None) -> Row:
        """The row of a model on a task.

        Raises:
            KeyError: it was not measured.
        """
        for row in self.rows:
            if (row.model, row.task) == (model, task) and kind in (None, row.kind):
                return row
        raise KeyError(f"no row for {kind or 'model'} {model!r} on {task!r}")

    def to_dict(self) -> dict[str, Any]:
        settings = {"meswitch": __version__, "n": self.n, "seed": self.seed}
        return {**settings, "rows": [row.to_dict() for row in self.rows]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_markdown(self) -> str:
        """A pipe table and a line that defines its columns."""
        lines = [HEADINGS, ("---",) * len(HEADINGS), *(row.cells for row in self.rows)]
        table = "\n".join(f"| {' | '.join(cells)} |".replace("\n", " ") for cells in lines)
        return f"{table}\n\nn = {self.n}, seed = {self.seed}; {NOTES}\n"

    def to_table(self) -> Table:
        """A rich table; print it with `rich.console.Console().print(table)`."""
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
            caption=f"n = {self.n}, seed = {self.seed}; {NOTES}",
            caption_justify="left",
        )
        for i, heading in enumerate(HEADINGS):
            # One word a line keeps the whole table within 80 columns.
            heading = heading.replace(" ", "\n").replace("/", "/\n")
            table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=True)
        previous = None
        for row in self.rows:
            if previous not in (None, row.task):
                table.add_section()
            previous = row.task
            table.add_row(*row.cells)
        return table


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return f"{value:.3f}"
    low, high = (f"{end:.3f}".removeprefix("0") for end in interval)
    return f"{value:.3f}\n[{low}, {high}]"

"""What an evaluation found, as JSON, Markdown or a table for the terminal."""

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from meswitch import __version__
from meswitch.evaluate.answers import Score
from meswitch.evaluate.fidelity import Fidelity
from meswitch.evaluate.gain import Z95, Comparison, GainRetained, Interval
from meswitch.evaluate.harness import Measure

if TYPE_CHECKING:
    from rich.table import Table

Kind = Literal["base", "expert", "delta"]
HEADINGS = ("task", "model", "accuracy", "gain retained", "bpw", "KL", "top-1", "lost/gained")
NOTES = (
    "in brackets: 95 % intervals; gain retained = (compressed - base) / (expert - base), both on the same questions; "
    "bpw = bits per weight, all bytes of the artifact x 8 / all parameters of the expert; "
    "KL (nats a token) and top-1 agreement are against the full expert, on its own answers or the task's texts; "
    "lost/gained = questions that only the full expert / only this model answered right, with McNemar's exact p."
)
HARNESS_NOTES = "lm-eval's tasks have no KL and top-1; under the task its metric, which the column accuracy shows."


@dataclass(frozen=True, slots=True)
class ResultRow:
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
    measure: Measure | None = None  # what lm-eval reported, on one of its tasks

    @property
    def metric(self) -> str:
        """What `value` is: accuracy on questions of one's own, lm-eval's name for it on its tasks."""
        return self.measure.metric if self.measure else "accuracy"

    @property
    def value(self) -> float | None:
        return self.measure.value if self.measure else self.score.accuracy if self.score else None

    @property
    def stderr(self) -> float | None:
        """Standard error of `value`: lm-eval's own, or by the same formula (n - 1) from right and wrong answers."""
        if self.measure:
            return self.measure.stderr
        if self.score is None or self.score.total < 2:
            return None
        return math.sqrt(self.score.accuracy * (1 - self.score.accuracy) / (self.score.total - 1))

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, one cell for each of `HEADINGS`, of one or two lines."""
        score, fidelity, gain, pairs = self.score, self.fidelity, self.gain, self.comparison
        retained = None if gain is None or gain.value is None else _with_interval(gain.value, gain.interval)
        interval = score.interval if score else None
        if score is None and self.value is not None and self.stderr is not None:
            interval = Interval(self.value - Z95 * self.stderr, self.value + Z95 * self.stderr)
        asked = f"n={score.total}" if score else f"{fidelity.sequences} texts" if fidelity else ""
        return (
            "\n".join(filter(None, (self.task, self.metric if self.measure else "", asked))),
            self.model if self.kind == "base" else f"{self.model}\n{self.kind}",
            _with_interval(self.value, interval) if self.value is not None else "-",
            retained or "-",
            f"{self.bits_per_weight:.3f}" if self.bits_per_weight is not None else "-",
            f"{fidelity.kl:.4f}" if fidelity else "-",
            f"{fidelity.top1:.4f}" if fidelity else "-",
            f"{pairs.lost}/{pairs.gained}\np={pairs.p_value:.1g}" if pairs else "-",
        )

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON; `outcomes` is a string of 1 (right) and 0, in the order of the questions."""
        data = asdict(self)
        del data["measure"]
        data |= {"metric": self.metric, "value": self.value, "stderr": self.stderr}
        if self.score is not None:
            data["score"] = {
                "questions": self.score.questions,
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

    rows: tuple[ResultRow, ...]
    limit: int | None = None  # of questions a task

    def get(self, model: str, task: str, kind: Kind | None = None, metric: str | None = None) -> ResultRow:
        """The row of a model on a task; the first one, where lm-eval gives several metrics and none is named.

        Raises:
            KeyError: it was not measured.
        """
        for row in self.rows:
            if (row.model, row.task) == (model, task) and kind in (None, row.kind) and metric in (None, row.metric):
                return row
        raise KeyError(f"no row for {kind or 'model'} {model!r} on {task!r}" + (f" with {metric!r}" if metric else ""))

    @property
    def _caption(self) -> str:
        return f"{NOTES} {HARNESS_NOTES}" if any(row.measure for row in self.rows) else NOTES

    def to_dict(self) -> dict[str, Any]:
        return {"meswitch": __version__, "limit": self.limit, "rows": [row.to_dict() for row in self.rows]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_markdown(self) -> str:
        """A pipe table and a line that defines its columns."""
        lines = [HEADINGS, ("---",) * len(HEADINGS), *(row.cells for row in self.rows)]
        table = "\n".join(f"| {' | '.join(cells)} |".replace("\n", " ") for cells in lines)
        return f"{table}\n\n{self._caption}\n"

    def to_table(self) -> "Table":
        """A rich table; print it with `rich.console.Console().print(table)`."""
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
            caption=self._caption,
            caption_justify="left",
        )
        for i, heading in enumerate(HEADINGS):
            # One word a line keeps the whole table within 80 columns.
            heading = heading.replace(" ", "\n").replace("/", "/\n")
            # Names of lm-eval's tasks can be long: those, and only those, are broken rather than cut.
            table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=i > 0, overflow="fold")
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

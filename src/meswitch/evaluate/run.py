"""Measure a base, its full experts and their compressed deltas side by side on the same questions, and report it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from meswitch import __version__
from meswitch.adapter import is_adapter, open_expert
from meswitch.architecture import architecture_of
from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.compression.merge import load_merged
from meswitch.errors import CheckpointError, ConfigError
from meswitch.evaluate.fidelity import Fidelity, Text, fidelity
from meswitch.evaluate.harness import Harness, HarnessSettings, Measure
from meswitch.evaluate.questions import (
    MAX_NEW_TOKENS,
    Z95,
    Comparison,
    GainRetained,
    Interval,
    Score,
    Task,
    accuracy,
    compare,
    gain_retained,
    own_answers,
)
from meswitch.loaded import load_model
from meswitch.tokenizer import load_tokenizer
from meswitch.units import plural

if TYPE_CHECKING:
    from rich.table import Table


Source = str | Path


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


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    Args:
        limit: of an lm-eval task, its first so many questions; None asks all.
        fidelity_n: questions of a task that the full expert answers itself, for KL and top-1 on its answers.
        max_new_tokens: of an answer.
        batch_size: questions answered at once.
        device: `auto` is a GPU if there is one.
        dtype: what the models compute in.
        harness: what lm-eval is told.
    """

    limit: int | None = None
    fidelity_n: int = 128
    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = 64
    device: str = "auto"
    dtype: torch.dtype = torch.float32
    harness: HarnessSettings = field(default_factory=HarnessSettings)


@dataclass(frozen=True, slots=True)
class _Loaded:
    model: Any
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class _Result:
    """One figure of one model; lm-eval tasks give one for each metric."""

    task: str
    score: Score | None
    measure: Measure | None = None


_Results = Mapping[tuple[str, str], _Result]  # by task and metric


def evaluate_family(
    base: Source,
    experts: Mapping[str, Source],
    deltas: Mapping[str, Source] | None = None,
    *,
    tasks: Sequence[Task | str],
    owners: Mapping[str, str | None] | None = None,
    settings: Settings = Settings(),
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Ask the base, every full expert and every delta artifact the same questions.

    At most three models are in memory at a time:
    base, one expert, one of its deltas.

    Args:
        base: the base checkpoint.
        experts: full fine-tunes by name.
        deltas: artifacts by name.
        tasks: questions of one's own (`read_task`), and names of lm-eval tasks, which have a row for each of their
            metrics and no fidelity. A task that names an expert is asked of it, its deltas and the base, any other of
            every model.
        owners: the expert that each delta is compared with, None for one of no expert here. Left out, it is the expert
            of the delta's name, or the only one.
        settings: how to measure.
        say: is told a line of progress before each step.

    Raises:
        ConfigError: no task, a task for an expert that is not there, lm-eval is needed and not installed or knows no
            such task, or a delta that belongs to none of several experts.
        CheckpointError: a checkpoint cannot be read.
        ArtifactError: a delta cannot be read.
        IncompatibleError: a delta of another base.
    """
    deltas = deltas or {}
    owners = {delta: _owner(delta, experts) for delta in deltas} if owners is None else owners
    plan = _plan(experts, owners, tasks)
    _device(settings)
    checkpoint = Checkpoint.open(base)  # what is wrong is said now, not after minutes of measuring
    for source in experts.values():
        if not is_adapter(source):
            Checkpoint.open(source)
    known = fingerprint(checkpoint) if deltas else None
    for source in (*deltas.values(), *filter(is_adapter, experts.values())):
        open_expert(source, checkpoint).check_base(checkpoint, known=known)
    own = {task.name: task for task in tasks if isinstance(task, Task)}
    foreign = [task for task in tasks if isinstance(task, str)]
    run = _Run(settings, say, own, Harness(foreign, settings.harness) if foreign else None)

    say(f"base: {base}")
    origin = _load_checkpoint(base, settings)
    of_base = run.results(origin, [*own, *foreign])
    rows = []
    against: dict[tuple[str, str], ResultRow] = {}  # the base's rows, each against the only expert that the task is for
    for name, source in experts.items():
        if not plan[name]:
            say(f"expert {name}: none of the tasks is for it")
            continue
        say(f"expert {name}: {source}")
        expert = _load_delta(base, source, settings)[0] if is_adapter(source) else _load_checkpoint(source, settings)
        of_expert = run.results(expert, plan[name])
        texts = {task: run.texts(expert, task) for task in plan[name] if task in own}
        rows += [_row(result, name, "expert", source, name) for result in of_expert.values()]
        for key, result in of_expert.items():
            if len(experts) == 1 or (result.task in own and own[result.task].expert == name):
                on = texts.get(result.task) if _vocabulary(origin) == _vocabulary(expert) else None
                distance = fidelity(origin.model, expert.model, on) if on else None
                against[key] = _row(of_base[key], "base", "base", base, name, fidelity=distance)
        for delta in (delta for delta, owner in owners.items() if owner == name):
            say(f"delta {delta}: {deltas[delta]}")
            merged, bits = _load_delta(base, deltas[delta], settings)
            for key, result in run.results(merged, plan[name]).items():
                on = texts.get(result.task)
                score, full, none = result.score, of_expert[key].score, of_base[key].score
                rows.append(
                    _row(
                        result,
                        delta,
                        "delta",
                        deltas[delta],
                        name,
                        fidelity=fidelity(merged.model, expert.model, on) if on else None,
                        gain=gain_retained(score, full, none) if score and full and none else None,
                        comparison=compare(full, score) if score and full else None,
                        bits_per_weight=bits,
                    )
                )
    for delta in (delta for delta, owner in owners.items() if owner is None):
        if not plan[delta]:
            say(f"delta {delta}: none of the tasks is for it")
            continue
        say(f"delta {delta}: {deltas[delta]}")
        merged, bits = _load_delta(base, deltas[delta], settings)
        for result in run.results(merged, plan[delta]).values():
            rows.append(_row(result, delta, "delta", deltas[delta], None, bits_per_weight=bits))
    first = [against.get(key, _row(result, "base", "base", base, None)) for key, result in of_base.items()]
    order = {key: place for place, key in enumerate(of_base)}
    rows = sorted([*first, *rows], key=lambda row: order[row.task, row.metric])  # stable: base, then in order of work
    return Report(tuple(rows), settings.limit)


@dataclass(frozen=True, slots=True)
class _Run:
    settings: Settings
    say: Callable[[str], None]
    own: Mapping[str, Task]
    harness: Harness | None

    def results(self, loaded: _Loaded, tasks: Sequence[str]) -> _Results:
        """What a model does on each of the tasks, lm-eval's last."""
        results = {(name, "accuracy"): _Result(name, self.score(loaded, name)) for name in tasks if name in self.own}
        if self.harness is None or len(results) == len(tasks):
            return results
        self.say(f"  lm-eval: {', '.join(self.harness.tasks)}")
        s = self.settings
        for measure in self.harness.run(loaded.model, loaded.tokenizer, s.limit, s.batch_size):
            # lm-eval asks the first questions of its task, the same of every model
            score = Score(measure.task, "lm-eval", measure.outcomes) if measure.outcomes else None
            results[measure.task, measure.metric] = _Result(measure.task, score, measure)
        return results

    def score(self, loaded: _Loaded, name: str) -> Score | None:
        task, s = self.own[name], self.settings
        if not task.is_checked:
            return None
        self.say(f"  {name}: {plural(len(task.questions), 'question')}")
        return accuracy(loaded.model, loaded.tokenizer, task, s.max_new_tokens, s.batch_size)

    def texts(self, expert: _Loaded, name: str) -> list[Text]:
        """What predictions are compared on: the task's texts, or its questions with the expert's own answers."""
        task, s = self.own[name], self.settings
        if task.texts:
            return [Text(tuple(expert.tokenizer(text)["input_ids"])) for text in task.texts[: s.fidelity_n]]
        prompts = [question.prompt for question in task.questions[: s.fidelity_n]]
        self.say(f"  {name}: KL on the expert's own answers to {plural(len(prompts), 'question')}")
        return own_answers(expert.model, expert.tokenizer, prompts, s.max_new_tokens, s.batch_size)


def _row(result: _Result, model: str, kind: Kind, path: Source, expert: str | None, **found: Any) -> ResultRow:
    return ResultRow(result.task, model, kind, str(path), expert, result.score, measure=result.measure, **found)


def _owner(delta: str, experts: Mapping[str, Source]) -> str | None:
    if delta in experts or not experts:
        return delta if experts else None
    if len(experts) == 1:
        return next(iter(experts))
    raise ConfigError(
        f"delta {delta!r}: none of the experts has this name ({', '.join(experts)}); "
        "name the expert it was made from, as in NAME=PATH"
    )


def _plan(
    experts: Mapping[str, Source], owners: Mapping[str, str | None], tasks: Sequence[Task | str]
) -> dict[str, tuple[str, ...]]:
    """The names of the tasks of each expert and of each delta without one."""
    if not tasks:
        raise ConfigError("tasks: none; give questions of your own or names of lm-eval tasks")
    named = [task if isinstance(task, str) else task.name for task in tasks]
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise ConfigError(f"tasks: {twice!r} is given twice; give one of the files another name")
    models = [*experts, *(delta for delta, owner in owners.items() if owner is None)]
    for task in tasks:
        if isinstance(task, Task) and task.expert is not None and task.expert not in models:
            there = ", ".join(models) or "none"
            raise ConfigError(f"task {task.name}: it is for the expert {task.expert!r}; there are {there}")
    return {
        name: tuple(
            task if isinstance(task, str) else task.name
            for task in tasks
            if isinstance(task, str) or task.expert in (None, name)
        )
        for name in models
    }


def _vocabulary(loaded: _Loaded) -> int:
    return loaded.model.get_output_embeddings().weight.shape[0]


def _load_checkpoint(source: Source, settings: Settings) -> _Loaded:
    checkpoint = Checkpoint.open(source)
    directory = checkpoint.directory
    try:
        model = load_model(checkpoint, architecture_of(checkpoint.config, text_only=True), settings.dtype)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{directory}: transformers cannot load it ({reason}); it needs config.json and its tokenizer's files"
        ) from error
    return _Loaded(model.to(_device(settings)).eval(), load_tokenizer(directory))


def _load_delta(base: Source, source: Source, settings: Settings) -> tuple[_Loaded, float]:
    artifact = open_expert(source, Checkpoint.open(base))
    model = load_merged(base, artifact.directory, dtype=settings.dtype)
    tokenizer = load_tokenizer(artifact.directory)
    return _Loaded(model.to(_device(settings)).eval(), tokenizer), artifact.bits_per_weight


def _device(settings: Settings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(settings.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown name; torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device: {settings.device!r} cannot be used ({reason}); use auto or cpu") from None
    return device

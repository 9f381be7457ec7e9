"""Measure a base, its full experts and their compressed deltas side by side on the same questions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meswitch.adapter import is_adapter, open_expert
from meswitch.architecture import architecture_of
from meswitch.checkpoint import Checkpoint
from meswitch.compression.merge import load_merged
from meswitch.errors import CheckpointError, ConfigError
from meswitch.evaluate.accuracy import MAX_NEW_TOKENS, Score, accuracy, own_answers
from meswitch.evaluate.fidelity import Text, fidelity
from meswitch.evaluate.gain import compare, gain_retained
from meswitch.evaluate.harness import PREFIX, Harness, HarnessSettings, Measure
from meswitch.evaluate.report import Kind, Report, Row
from meswitch.evaluate.tasks import CHECKABLE, DOMAINS
from meswitch.loaded import load_model
from meswitch.tokenizer import load_tokenizer

Source = str | Path


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure. `fidelity_n` prompts a task are answered by the full expert, and compared on its answers."""

    n: int = 1000
    seed: int = 2
    fidelity_n: int = 128
    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = 256
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
    tasks: Sequence[str] | None = None,
    settings: Settings = Settings(),
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Ask the base, every full expert and every delta artifact the same questions.

    A delta belongs to the expert of its name, or to the only expert. With `tasks` None each expert is measured on
    the domain it is named after, and the base on all of those; otherwise every model on every task. On `sql`,
    which has no exact check, there is fidelity only. A task `lm:NAME` is lm-evaluation-harness's NAME: a row for
    each of its metrics, without fidelity. At most three models are in memory at a time (base, one expert, one of
    its deltas); `say` is called with a line of progress before each step.

    Raises:
        ConfigError: unknown task, lm-eval is needed and not installed, nothing to measure, or a delta that belongs
            to none of several experts.
        CheckpointError: a checkpoint cannot be read.
        ArtifactError: a delta cannot be read.
        IncompatibleError: a delta of another base.
    """
    deltas = deltas or {}
    owners = {delta: _owner(delta, experts) for delta in deltas}
    plan = _plan(experts, owners, tasks)
    _device(settings)
    checkpoint = Checkpoint.open(base)  # what is wrong is said now, not after minutes of measuring
    for source in experts.values():
        if not is_adapter(source):
            Checkpoint.open(source)
    for source in (*deltas.values(), *filter(is_adapter, experts.values())):
        open_expert(source, checkpoint)
    every = list(dict.fromkeys(task for names in plan.values() for task in names))
    foreign = [task for task in every if task.startswith(PREFIX)]
    run = _Run(settings, say, Harness(foreign, settings.harness) if foreign else None)

    say(f"base: {base}")
    origin = _load_checkpoint(base, settings)
    of_base = run.results(origin, every)
    rows = []
    against: dict[tuple[str, str], Row] = {}  # the base's rows, each against the expert that the task is named after
    for name, source in experts.items():
        say(f"expert {name}: {source}")
        expert = _load_delta(base, source, settings)[0] if is_adapter(source) else _load_checkpoint(source, settings)
        of_expert = run.results(expert, plan[name])
        texts = {task: run.texts(expert, task) for task in plan[name] if task in DOMAINS}
        rows += [_row(result, name, "expert", source, name) for result in of_expert.values()]
        for key, result in of_expert.items():
            if result.task == name or len(experts) == 1:
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
        say(f"delta {delta}: {deltas[delta]}")
        merged, bits = _load_delta(base, deltas[delta], settings)
        for result in run.results(merged, plan[delta]).values():
            rows.append(_row(result, delta, "delta", deltas[delta], None, bits_per_weight=bits))
    first = [against.get(key, _row(result, "base", "base", base, None)) for key, result in of_base.items()]
    order = {key: place for place, key in enumerate(of_base)}
    rows = sorted([*first, *rows], key=lambda row: order[row.task, row.metric])  # stable: base, then in order of work
    return Report(tuple(rows), settings.n, settings.seed)


@dataclass(frozen=True, slots=True)
class _Run:
    settings: Settings
    say: Callable[[str], None]
    harness: Harness | None

    def results(self, loaded: _Loaded, tasks: Sequence[str]) -> _Results:
        """What a model does on each of the tasks, lm-eval's last."""
        results = {(task, "accuracy"): _Result(task, self.score(loaded, task)) for task in tasks if task in DOMAINS}
        if self.harness is None or len(results) == len(tasks):
            return results
        self.say(f"  lm-eval: {', '.join(self.harness.tasks)}")
        for measure in self.harness.run(loaded.model, loaded.tokenizer, self.settings.n, self.settings.batch_size):
            # The seed is not ours: lm-eval asks the first questions of its task, the same of every model.
            score = Score(measure.task, 0, measure.outcomes) if measure.outcomes else None
            results[measure.task, measure.metric] = _Result(measure.task, score, measure)
        return results

    def score(self, loaded: _Loaded, task: str) -> Score | None:
        if task not in CHECKABLE:
            return None
        s = self.settings
        self.say(f"  {task}: {s.n} questions")
        return accuracy(
            loaded.model,
            loaded.tokenizer,
            task,
            s.n,
            s.seed,
            max_new_tokens=s.max_new_tokens,
            batch_size=s.batch_size,
        )

    def texts(self, expert: _Loaded, task: str) -> list[Text]:
        """Held-out conversations: prompts of the task with the expert's own answers, compared on the answers."""
        s = self.settings
        how = {"max_new_tokens": s.max_new_tokens, "batch_size": s.batch_size}
        return own_answers(expert.model, expert.tokenizer, task, s.fidelity_n, s.seed, **how)


def _row(result: _Result, model: str, kind: Kind, path: Source, expert: str | None, **found: Any) -> Row:
    return Row(result.task, model, kind, str(path), expert, result.score, measure=result.measure, **found)


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
    experts: Mapping[str, Source], owners: Mapping[str, str | None], tasks: Sequence[str] | None
) -> dict[str, tuple[str, ...]]:
    """The tasks of each expert and of each delta without one."""
    for task in tasks or ():
        if task not in DOMAINS and not task.startswith(PREFIX):
            raise ConfigError(
                f"tasks: no domain {task!r}; choose from {', '.join(DOMAINS)}, or {PREFIX}NAME for a task of lm-eval"
            )
    names = [*experts, *(delta for delta, owner in owners.items() if owner is None)]
    own = {name: (name,) if name in DOMAINS else () for name in names}
    plan = {name: tuple(dict.fromkeys(tasks)) if tasks is not None else own[name] for name in names}
    if names and not any(plan.values()):
        raise ConfigError(
            f"tasks: {', '.join(names)} are no domains of exact questions; say which to ask, of {', '.join(DOMAINS)}"
        )
    if not names:
        plan = {"": tuple(dict.fromkeys(tasks or CHECKABLE))}
    return plan


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

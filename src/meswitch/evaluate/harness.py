"""Tasks of lm-evaluation-harness, asked of models that are in memory already."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meswitch.cpu import fitting_threads
from meswitch.errors import ConfigError

_BOOTSTRAPS = 1000  # for metrics other than means; lm-eval's 100,000 can take longer than the answers


@dataclass(frozen=True, slots=True)
class HarnessSettings:
    """What lm-eval is told beside the task: all as its own command line has it, and off unless asked for."""

    chat_template: bool = False
    fewshot: int | None = None  # None: what each task says
    include: Path | None = None  # a directory of task files of one's own


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric of one task. `outcomes`: right or wrong a question, where that is what `value` is the mean of."""

    task: str
    metric: str  # `acc`; `exact_match,strict-match` where the task names its filter
    value: float
    stderr: float | None
    outcomes: tuple[bool, ...] | None = field(default=None, repr=False)


def require_lm_eval() -> None:
    """Raises ConfigError where the package is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed; pip install 'meswitch[lm-eval]'")


class Harness:
    """lm-eval tasks by name, checked once and then asked of one model after another."""

    def __init__(self, tasks: Sequence[str], settings: HarnessSettings) -> None:
        """Find the tasks and load their data once, before any model is loaded.

        Raises:
            ConfigError: lm-eval is not installed, knows no such task, cannot load its data, or would run code that
                the model writes.
        """
        require_lm_eval()
        self.settings = settings
        self.tasks = tuple(tasks)
        self._manager = _task_manager(self.tasks, settings.include)
        for task in self.tasks:
            try:
                loaded = self._manager.load([task])["tasks"]
            except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
                reason = (str(error) or type(error).__name__).partition("\n")[0]
                raise ConfigError(f"tasks: {task}: lm-eval cannot load it ({reason})") from error
            if any(getattr(one, "UNSAFE_CODE", False) for one in loaded.values()):
                raise ConfigError(
                    f"tasks: {task} runs code that the model writes, outside any sandbox; if that is what you "
                    "want, use `python -m meswitch.evaluate.lm_eval ... --confirm_run_unsafe_code`"
                )

    def run(self, model: Any, tokenizer: Any, n: int | None = None, batch_size: int = 1) -> list[Measure]:
        """Ask a `transformers` causal LM the first `n` questions of every task (None: all of them).

        Returns:
            every metric of every task, in the order of `tasks`; of a group its own figures, of a tag its tasks'.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        measures: list[Measure] = []
        for task in self.tasks:
            with fitting_threads(model.device, model.config.get_text_config().hidden_size):
                found = simple_evaluate(
                    model=lm,
                    tasks=[task],
                    num_fewshot=self.settings.fewshot,
                    limit=n,
                    bootstrap_iters=_BOOTSTRAPS,
                    apply_chat_template=self.settings.chat_template and bool(tokenizer.chat_template),
                    task_manager=self._manager,
                )
            names = [task] if task in found["results"] else list(found["results"])
            measures += [measure for name in names for measure in _measures(name, found)]
        return measures


def _task_manager(tasks: Sequence[str], include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    # lm-eval reads some 10,000 task files to know its own tasks, which takes longer than a small model's answers.
    if include is not None:
        if not include.is_dir():
            raise ConfigError(f"{include}: no such directory of lm-eval tasks")
        own = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=str(include) if include is not None else None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(
            f"tasks: lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists its own, and a directory "
            "with others can be included"
        )
    return manager


def _measures(name: str, found: Mapping[str, Any]) -> Iterator[Measure]:
    """lm-eval's `{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}` as one `Measure` a metric."""
    values = found["results"][name]
    for key, value in values.items():
        metric, _, filtered_by = key.partition(",")
        if not filtered_by or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{filtered_by}")
        yield Measure(
            name,
            metric if filtered_by == "none" else key,
            float(value),
            float(stderr) if isinstance(stderr, int | float) else None,
            _outcomes(name, found, metric, filtered_by, value),
        )


def _outcomes(
    name: str, found: Mapping[str, Any], metric: str, filtered_by: str, value: float
) -> tuple[bool, ...] | None:
    samples = [sample for task in _leaves(name, found) for sample in found["samples"].get(task, ())]
    asked = [sample[metric] for sample in samples if sample["filter"] == filtered_by and metric in sample]
    # A metric can be something else than a mean, and a group's mean can weigh its tasks equally.
    if not asked or any(one not in (0, 1) for one in asked) or abs(sum(asked) / len(asked) - value) > 1e-6:
        return None
    return tuple(bool(one) for one in asked)


def _leaves(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    below = found.get("group_subtasks", {}).get(name) or ()
    if not below:
        yield name
    for task in below:
        yield from _leaves(task, found)

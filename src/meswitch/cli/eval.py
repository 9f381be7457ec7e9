"""`meswitch eval`: what compression cost, on any questions."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from meswitch.cli import console
from meswitch.cli.options import option_groups
from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from meswitch.evaluate import Task
    from meswitch.family import ExpertSection, Family

_MODELS, _LM_EVAL, _WORK = "Models", "Tasks of lm-eval", "Work"


@dataclass(frozen=True, slots=True)
class Models:
    """What is asked."""

    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|HUB_ID", rich_help_panel=_MODELS, help="The base checkpoint.", show_default="of the recipe"
        ),
    ] = None
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR|HUB_ID|NAME",
            rich_help_panel=_MODELS,
            help="A full fine-tune to compare the artifact with; its name is that of the directory. With `--family`: "
            "the name of an expert to measure; all if left out. Repeatable.",
        ),
    ] = None
    family: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_MODELS,
            help="Instead of paths: a family.toml, whose base, full experts and artifacts are asked. Its experts' "
            "own `questions` are asked too.",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Which questions."""

    questions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[EXPERT=]FILE",
            help="JSON lines of `prompt` (or `messages`) and `answer`; or of `text`, to measure KL along it. With "
            "EXPERT= only that expert and the base are asked. Repeatable.",
        ),
    ] = None
    checker: Annotated[
        str | None,
        typer.Option(
            metavar="exact|number|regex|none|FILE.py:FUNCTION",
            help="When is a reply right? `exact`: it is the answer. `number`: its last number is the answer's. "
            "`regex`: the answer is a pattern that it contains. A function gets reply and answer. `none`: KL alone.",
        ),
    ] = None
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Tasks of lm-evaluation-harness, such as gsm8k,arc_easy. Needs `meswitch[lm-eval]`.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option("--limit", "-n", min=1, help="At most the first so many questions of each task; all by default."),
    ] = None
    fidelity_n: Annotated[
        int,
        typer.Option(
            "--kl-questions",
            min=1,
            help="So many of them for KL and top-1 agreement: the full expert answers them, and the other models are "
            "compared with it token by token on its answers.",
        ),
    ] = 128


@dataclass(frozen=True, slots=True)
class LmEval:
    """What lm-eval is told; named as lm-eval names it."""

    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            rich_help_panel=_LM_EVAL,
            help="Ask in the chat template; lm-eval's default is plain text.",
        ),
    ] = False
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0, rich_help_panel=_LM_EVAL, help="Examples before each question. Left out: what the task says."
        ),
    ] = None
    include_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=_LM_EVAL, help="A directory of task files (YAML) of your own."),
    ] = None


@dataclass(frozen=True, slots=True)
class Work:
    """How they are computed."""

    max_new_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=_WORK, help="Longest answer to one of --questions, in tokens.")
    ] = 256
    batch_size: Annotated[
        int, typer.Option(min=1, rich_help_panel=_WORK, help="Questions answered at once; less if memory is short.")
    ] = 64
    device: Annotated[
        str, typer.Option(rich_help_panel=_WORK, help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    ] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(rich_help_panel=_WORK, help="What the models compute in."),
    ] = "float32"


@option_groups
def eval_command(
    artifact: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]ARTIFACT",
            help="What `meswitch compress` wrote: directories, or hf://ORG/NAME. Each is compared with the --expert of "
            "its name, or with the only one.",
        ),
    ] = None,
    models: Models = Models(),
    asked: Asked = Asked(),
    lm_eval: LmEval = LmEval(),
    work: Work = Work(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the result to FILE.json or FILE.md.")
    ] = None,
) -> None:
    """Measure what compression cost: accuracy, gain retained and divergence from the full expert.

    Base, full expert and compressed expert answer the same questions, so that a difference of a few answers can be told
    from chance. Gain retained is (compressed - base) / (expert - base); its interval is a paired bootstrap. KL needs no
    right answers and sees damage long before accuracy does.

    Examples:

        meswitch eval deltas/math --base B --expert B-math --questions test.jsonl --checker number
        meswitch eval deltas/law --base B --expert B-law --questions prompts.jsonl
        meswitch eval deltas/code --base B --expert B-code --questions q.jsonl --checker tests.py:passes
        meswitch eval deltas/math --base B --expert B-math --tasks gsm8k,arc_easy --apply-chat-template
        meswitch eval --family family.toml --expert math
    """
    if out is not None and out.suffix not in (".json", ".md"):
        raise ConfigError(f"--out {out}: the ending says the format; use .json or .md")
    if models.family is None and models.base is None and artifact:
        models = _recorded(models, artifact[0])
    if (models.family is None) == (models.base is None):
        raise ConfigError("--base or --family: give one of the two, the base of what is measured or a family.toml")
    foreign = list(filter(None, (name.strip() for name in (asked.tasks or "").split(","))))
    if not foreign and (lm_eval.apply_chat_template or lm_eval.num_fewshot is not None or lm_eval.include_path):
        raise ConfigError(
            "--apply-chat-template, --num-fewshot, --include-path: are about tasks of lm-eval; name --tasks"
        )
    if asked.checker is not None and not asked.questions:
        raise ConfigError("--checker: says when a reply to one of --questions is right; give --questions FILE")
    own: list[Task] = []
    if models.family is not None:
        if artifact:
            raise ConfigError(
                f"ARTIFACT: {', '.join(artifact)}: a family names its own; choose by --expert NAME, or use --base"
            )
        from meswitch.family import Family

        family = Family.load(models.family)
        sections = [family.get(name) for name in dict.fromkeys(models.expert or ())] or list(family.expert)
        origin = family.base_source()
        experts, deltas = _members(family, models.family, sections)
        own += _questions_of(family, models.family, sections, asked.limit)
    else:
        origin = str(models.base)
        experts, deltas = _named("--expert", models.expert or []), _named("ARTIFACT", artifact or [])
    own += _questions(asked)
    if not own and not foreign:
        beside = "" if models.family is None else ", or name `questions` and a `checker` for experts in the family.toml"
        raise ConfigError(
            f"--questions or --tasks: what is asked? give a file of questions or names of lm-eval tasks{beside}"
        )

    from meswitch.durable import make_parent, write_text

    if out is not None:
        make_parent(out)
    import torch

    from meswitch.evaluate import HarnessSettings, Settings, evaluate_family

    console.quiet()
    if not console.debugging():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    settings = Settings(
        asked.limit,
        asked.fidelity_n,
        work.max_new_tokens,
        work.batch_size,
        work.device,
        getattr(torch, work.dtype),
        HarnessSettings(lm_eval.apply_chat_template, lm_eval.num_fewshot, lm_eval.include_path),
    )
    # in a family a delta without a `source` is of no other expert, though there be one only
    owners = {name: name if name in experts else None for name in deltas} if models.family is not None else None
    report = evaluate_family(
        origin, experts, deltas, tasks=[*own, *foreign], owners=owners, settings=settings, say=console.note
    )
    if out is not None:
        write_text(out, report.to_json() if out.suffix == ".json" else report.to_markdown())
    if as_json:
        console.print_json(report.to_dict())
    else:
        console.show(report.to_table())


def _recorded(models: Models, artifact: str) -> Models:
    """Base and expert as the first artifact's recipe has them, where they are hub ids."""
    from meswitch.artifact import Artifact

    recipe = Artifact.open(_named("ARTIFACT", [artifact]).popitem()[1]).manifest.recipe
    if recipe is None or recipe.base is None:
        raise ConfigError(f"--base: {artifact} was made from a directory; give the base's")
    return replace(models, base=recipe.base, expert=models.expert or ([recipe.expert] if recipe.expert else None))


_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)")


def _named(option: str, values: list[str]) -> dict[str, str]:
    """`["math=runs/m", "runs/code"]` -> `{"math": "runs/m", "code": "runs/code"}`."""
    named: dict[str, str] = {}
    for value in values:
        match = _NAMED.fullmatch(value)
        name, path = match.groups() if match else (Path(value).resolve().name, value)
        if name in named:
            raise ConfigError(f"{option} {value}: {name!r} is given twice; tell them apart with NAME=PATH")
        named[name] = path
    return named


def _questions(asked: Asked) -> Iterator["Task"]:
    """The tasks of the command line."""
    from meswitch.evaluate import read_task

    for value in asked.questions or ():
        match = _NAMED.fullmatch(value)
        expert, path = match.groups() if match else (None, value)
        yield read_task(path, asked.checker, expert=expert, limit=asked.limit)


def _questions_of(
    family: "Family", path: Path, sections: Sequence["ExpertSection"], limit: int | None
) -> Iterator["Task"]:
    """The tasks of some of a family's experts, named after them."""
    from meswitch.evaluate import read_task

    for section in sections:
        if section.questions is not None:
            checker = section.checker
            if checker is not None and checker.rpartition(":")[0].endswith(".py"):
                checker = str(family.resolve(checker))
            file = family.resolve(section.questions)
            if not file.exists():
                raise ConfigError(f"{path}: expert {section.name!r}: questions: {file}: no such file")
            yield read_task(file, checker, name=section.name, expert=section.name, limit=limit)


def _members(
    family: "Family", file: Path, sections: Sequence["ExpertSection"]
) -> tuple[dict[str, str], dict[str, str]]:
    """Full experts and deltas of some of a family's experts; what is not there yet is left out with a note."""
    experts: dict[str, str] = {}
    deltas: dict[str, str] = {}
    for section in sections:
        if section.source is not None:
            experts[section.name] = family.source_of(section)
        else:
            console.note(f"{section.name}: no `source` in {file}, so no full expert to compare with")
        if family.resolve(section.delta).exists():
            deltas[section.name] = str(family.resolve(section.delta))
        else:
            console.note(f"{section.name}: no delta yet; `meswitch compress --family {file}` makes it")
    return experts, deltas

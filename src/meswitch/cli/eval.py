"""`meswitch eval`: what compression cost, on questions with exact answers."""

import logging
import re
from pathlib import Path
from typing import Annotated

import typer

from meswitch.cli import console
from meswitch.errors import ConfigError


def evaluate(
    family: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A family.toml: measure its base, all its experts and the deltas made so far."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="DIR|HUB_ID", help="The base checkpoint.")] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR|HUB_ID", help="A full fine-tune; its name is that of the directory. Repeatable."
        ),
    ] = None,
    delta: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="A compressed expert: a directory that `meswitch compress` wrote. It is compared with the expert of "
            "its name, or with the only one given. Repeatable.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks that every model is asked: math, code, instruct (exact answers), sql (fidelity only) or "
            "lm:NAME, a task of lm-evaluation-harness such as lm:arc_easy, with commas. Left out: each expert is "
            "asked the one it is named after."
        ),
    ] = None,
    n: Annotated[
        int,
        typer.Option(
            "-n",
            "--questions",
            min=1,
            help="Questions a task; of an lm: task at most its first n. 1000 give about +-2 points of accuracy.",
        ),
    ] = 1000,
    seed: Annotated[
        int,
        typer.Option(help="Which questions. Not 1 (the example experts were trained on it) or 1001 (calibration)."),
    ] = 2,
    fidelity_n: Annotated[
        int,
        typer.Option(
            "--fidelity-questions",
            min=1,
            help="Prompts a task for KL and top-1 agreement: the full expert answers them, and the other model is "
            "compared with it token by token on those answers.",
        ),
    ] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once; less if memory is short.")] = 256,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: what the models compute in.")] = "float32",
    lm_chat_template: Annotated[
        bool,
        typer.Option("--lm-chat-template", help="lm: tasks in the chat template; lm-eval's default is plain text."),
    ] = False,
    lm_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples before each question of lm: tasks. Left out: what the task says."),
    ] = None,
    lm_include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A directory of lm-eval task files (YAML) of your own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the result to FILE.json or FILE.md.")
    ] = None,
) -> None:
    """Measure accuracy, gain retained and fidelity of compressed experts against the full ones.

    Every model answers the same questions, so that a difference of a few answers can be told from chance.
    Gain retained is (compressed - base) / (expert - base); its interval is a paired bootstrap. The table also
    shows the bits per weight of the whole artifact, because quality without size says little.

        meswitch eval --family examples/family
        meswitch eval --base B --expert math=M --delta math=out/math -n 2000
        meswitch eval --base B --expert math=M --delta math=out/math --tasks math,lm:gsm8k,lm:arc_easy
    """
    if out is not None and out.suffix not in (".json", ".md"):
        raise ConfigError(f"--out {out}: the ending says the format; use .json or .md")
    if (family is None) == (base is None):
        raise ConfigError("--family or --base: give one of the two, the family or the base of the experts to measure")
    if family is not None:
        if expert or delta:
            raise ConfigError("--expert, --delta: a family names its own; use --base to choose experts by hand")
        origin, experts, deltas = _family(family)
    else:
        origin, experts, deltas = str(base), _named("--expert", expert or []), _named("--delta", delta or [])

    import torch

    from meswitch.evaluate import HarnessSettings, Settings, evaluate_family

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}: use float32, bfloat16 or float16")
    names = [task.strip() for task in tasks.split(",")] if tasks else None
    if not any(name.startswith("lm:") for name in names or ()) and (
        lm_chat_template or lm_fewshot is not None or lm_include
    ):
        raise ConfigError(
            "--lm-chat-template, --lm-fewshot, --lm-include: are about tasks of lm-eval; name one, lm:TASK"
        )
    console.quiet()
    if not console.debugging():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = HarnessSettings(lm_chat_template, lm_fewshot, lm_include)
    report = evaluate_family(
        origin,
        experts,
        deltas,
        tasks=names,
        settings=Settings(
            n, seed, fidelity_n, batch_size=batch_size, device=device, dtype=getattr(torch, dtype), harness=harness
        ),
        say=console.note,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report.to_json() if out.suffix == ".json" else report.to_markdown())
    if as_json:
        console.print_json(report.to_dict())
    else:
        console.show(report.to_table())


def _named(option: str, values: list[str]) -> dict[str, str]:
    """`["math=runs/m", "runs/code"]` -> `{"math": "runs/m", "code": "runs/code"}`."""
    named: dict[str, str] = {}
    for value in values:
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", value)
        name, path = match.groups() if match else (Path(value).resolve().name, value)
        if name in named:
            raise ConfigError(f"{option} {value}: {name!r} is given twice; tell them apart with NAME=PATH")
        named[name] = path
    return named


def _family(file: Path) -> tuple[str, dict[str, str], dict[str, str]]:
    """Base, full experts and deltas of a family; what is not there yet is left out with a note."""
    from meswitch.family import Family

    family = Family.load(file)
    experts: dict[str, str] = {}
    deltas: dict[str, str] = {}
    for section in family.expert:
        if section.source is not None:
            experts[section.name] = family.resolve_model(section.source)
        else:
            console.note(f"{section.name}: no `source` in {file}, so no full expert to compare with")
        if family.resolve(section.delta).exists():
            deltas[section.name] = str(family.resolve(section.delta))
        else:
            console.note(f"{section.name}: no delta yet; `meswitch compress --family {file}` makes it")
    return family.resolve_model(family.base.path), experts, deltas

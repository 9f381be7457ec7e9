"""`meswitch route`: which expert would answer, and why."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meswitch.cli import console
from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from meswitch.router import Route, Router

_SHOWN = 20  # labels of a table

FamilyOption = Annotated[Path, typer.Option(metavar="FILE", help="A family.toml, or the directory that holds one.")]
RouterOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", show_default="what the family says", help="The router's directory."),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        show_default="the family's, or the calibrated one",
        help="Abstain if the best expert's probability is less. 0 never abstains.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        show_default="where it was when the router was trained; for training, the base",
        help="An LLM router's causal LM: a checkpoint directory or a hub id.",
    ),
]


def route_command(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The question; `-` reads it from stdin.")],
    family: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A family.toml, or the directory that holds one.")
    ] = None,
    routes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="In place of a family: TOML of [[route]] tables, or JSON, with name, description and examples.",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="With --routes: a sentence encoder, a directory or hub id."),
    ] = None,
    bits: Annotated[int, typer.Option(help="8 keeps that encoder's linear layers as int8, on the CPU.")] = 32,
    router: RouterOption = None,
    threshold: ThresholdOption = None,
    model: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the router's scores for one query and who would answer it.

    The scores are probabilities: over the experts and, if the router knows it, `other` (none of them). Below the
    threshold the router abstains and the family's fallback answers. No expert is loaded. A family whose router is not
    trained is routed by what family.toml says of its experts: `description` and `examples`.

    With --routes the choice is among any routes, without a family: `choice` is null where none is likely enough.

    Examples:

        meswitch route --family family.toml "What is 17 + 25?"
        meswitch route --family family.toml --threshold 0.9 --json - < question.txt
        meswitch route --routes routes.toml --encoder ./all-MiniLM-L6-v2 --json "I want my money back"
    """
    text = sys.stdin.read() if query == "-" else query
    if not text.strip():
        raise ConfigError("QUERY: it is empty")
    if routes is not None:
        if family is not None or router is not None or model is not None:
            raise ConfigError("--routes: takes the place of --family, --router and --model; give one or the other")
        _among(text, routes, encoder, bits, threshold, as_json)
        return
    if family is None:
        raise ConfigError("--family: missing; give a family.toml, or --routes FILE with --encoder DIR")
    if encoder is not None:
        raise ConfigError("--encoder: only with --routes; a family's is `router.encoder` of family.toml")
    loaded = open_router(family, router, threshold, model)
    loaded.route(text)  # the first pass of a process sets things up; the second one's latency is what a server sees
    decision = loaded.route(text)
    if as_json:
        console.print_json(dataclasses.asdict(decision) | {"threshold": loaded.threshold})
    else:
        _show(loaded, decision)


def _among(text: str, routes: Path, encoder: str | None, bits: int, threshold: float | None, as_json: bool) -> None:
    """One query over the routes of a file."""
    console.quiet()
    from meswitch.router import Decider, Space, open_encoder, read_options

    options = read_options(routes)
    if encoder is None:
        raise ConfigError("--encoder: missing; with --routes, give a sentence encoder's directory or hub id")
    decider = Decider(Space(open_encoder(encoder, bits=bits)))
    decision = decider.decide(text, options, threshold=threshold)
    if as_json:
        console.print_json(decision.to_dict())
        return
    end = f"threshold {decision.threshold:.2f}"
    console.show(_table(decision.scores), f"choice: {decision.choice or 'none of these'} ({end})")


def open_router(
    family: Path, router: Path | None, threshold: float | None, model: str | None = None, device: str = "cpu"
) -> "Router":
    """The family's router with the options in place of what the family says."""
    console.quiet()
    from meswitch.family import Family
    from meswitch.launch import router_from_family

    config = Family.load(family)
    device = console.check_device(device)
    return router_from_family(config, path=router, threshold=threshold, device=device, llm=model)


def _show(router: "Router", decision: "Route") -> None:
    if decision.reason == "abstained":
        why = f"the fallback, because no expert reaches the threshold {router.threshold:.2f}"
    else:
        why = f"margin {decision.margin:.2f}, threshold {router.threshold:.2f}"
    shown = _table(decision.scores)
    console.show(shown, f"choice: {decision.choice} ({why}; {decision.latency_ms:.1f} ms)")


def _table(scores: Mapping[str, float]) -> "Table":
    """The likeliest labels, as bars."""
    table = console.table("", "label", "probability", "")
    table.columns[2].justify = "left"
    for name, score in sorted(scores.items(), key=lambda item: -item[1])[:_SHOWN]:
        table.add_row(name, f"{score:.4f}", "█" * round(score * 30))
    return table

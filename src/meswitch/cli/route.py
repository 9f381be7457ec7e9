"""`meswitch route`: which expert would answer, and why."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meswitch.cli import console
from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from meswitch.router import Route, Router

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


def route(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The question; `-` reads it from stdin.")],
    family: FamilyOption,
    router: RouterOption = None,
    threshold: ThresholdOption = None,
    model: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the router's scores for one query and who would answer it.

    The scores are probabilities: over the experts and, if the router was trained with such rows, `other` (none of
    them). Below the threshold the router abstains and the family's fallback answers. No expert is loaded.

    Examples:

        meswitch route --family family.toml "What is 17 + 25?"
        meswitch route --family family.toml --threshold 0.9 --json - < question.txt
    """
    text = sys.stdin.read() if query == "-" else query
    if not text.strip():
        raise ConfigError("QUERY: it is empty")
    loaded = open_router(family, router, threshold, model)
    loaded.route(text)  # the first pass of a process sets things up; the second one's latency is what a server sees
    decision = loaded.route(text)
    if as_json:
        console.print_json(dataclasses.asdict(decision) | {"threshold": loaded.threshold})
    else:
        _show(loaded, decision)


def open_router(
    family: Path, router: Path | None, threshold: float | None, model: str | None = None, device: str = "cpu"
) -> "Router":
    """The family's router with the options in place of what the family says."""
    console.quiet()
    from meswitch.family import Family
    from meswitch.router import load_router

    config = Family.load(family)
    return load_router(
        router or config.resolve(config.router.path),
        config.resolve_model(config.base.path),
        experts=config.names,
        fallback=config.router.fallback,
        threshold=config.router.threshold if threshold is None else threshold,
        device=console.check_device(device),
        llm=model,
    )


def _show(router: "Router", decision: "Route") -> None:
    scores = console.table("", "label", "probability", "")
    scores.columns[2].justify = "left"
    for name, score in sorted(decision.scores.items(), key=lambda item: -item[1]):
        scores.add_row(name, f"{score:.4f}", "█" * round(score * 30))
    if decision.reason == "abstained":
        why = f"the fallback, because no expert reaches the threshold {router.threshold:.2f}"
    else:
        why = f"margin {decision.margin:.2f}, threshold {router.threshold:.2f}"
    console.show(scores, f"choice: {decision.choice} ({why}; {decision.latency_ms:.1f} ms)")

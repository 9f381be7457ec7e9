"""`meswitch router` trains and measures a router; `meswitch route` shows what it says of one query."""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meswitch.cli import console, router_train
from meswitch.cli.router_train import DataOption, DeviceOption, FamilyOption, JsonOption, ModelOption, OutOption
from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from meswitch.router import EmbeddingRouter, Evaluation, Route, Router


_SHOWN = 20  # labels of a table

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

app = typer.Typer(no_args_is_help=True, help="Train and measure the router that `model: auto` asks.")
app.add_typer(router_train.app, name="train")


@app.command("eval")
def eval_router(
    family: FamilyOption,
    data: DataOption,
    router: RouterOption = None,
    threshold: ThresholdOption = None,
    device: DeviceOption = "cpu",
    model: ModelOption = None,
    as_json: JsonOption = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the result to FILE.json or FILE.md.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also draw risk against coverage and reliability, as SVG; a report in Markdown shows them. Needs "
            "`meswitch[plot]`.",
        ),
    ] = None,
) -> None:
    """Measure the family's router on labelled queries.

    `accuracy` asks whether the right expert scores best, abstained or not; rows of `other` do not count there but for
    how well the router tells them apart (auroc). `confusion` counts what the router does, with abstentions in the
    column `other`; `coverage` is the share of the experts' queries that is answered. Measure on other data than it was
    trained on, from other sources if you can: that is what real traffic is.

    Example:

        meswitch router eval --family family.toml --data dev.jsonl --json
        meswitch router eval --family family.toml --data dev.jsonl --out report.md --plots plots
    """
    if out is not None and out.suffix not in (".json", ".md"):
        raise ConfigError(f"--out {out}: the ending says the format; use .json or .md")
    from meswitch.durable import make_parent
    from meswitch.family import Family
    from meswitch.router import evaluate_router, read_rows
    from meswitch.router.evaluate import draw_plots, markdown

    rows = read_rows(data, Family.load(family).names)
    if out is not None:
        make_parent(out)
    loaded = open_router(family, router, threshold, model, device)
    result = evaluate_router(loaded, rows)
    drawn = draw_plots(result, plots) if plots is not None else {}
    if out is not None:
        links = {title: Path(os.path.relpath(file, out.parent)).as_posix() for title, file in drawn.items()}
        out.write_text(
            markdown(result, links) if out.suffix == ".md" else json.dumps(result.to_dict(), indent=2) + "\n"
        )
    if as_json:
        console.print_json(result.to_dict())
    else:
        _show_evaluation(result)


@app.command()
def update(
    family: FamilyOption,
    router: RouterOption = None,
    out: OutOption = None,
    model: ModelOption = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="For an embedding router: rows of the new experts, 5 or more of each; 16 do well."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell a router of the family's experts as they are now, without training it again.

    An LLM router takes the family's descriptions: an expert that is new in family.toml is chosen by its description
    alone; one that is gone is forgotten. An embedding router needs --examples of the new experts; the training data
    is not needed, and the old experts' scores among themselves do not change. Measure the result with `meswitch
    router eval`.

    Examples:

        meswitch router update --family family.toml
        meswitch router update --family family.toml --examples law.jsonl
    """
    console.quiet()
    from meswitch.family import Family
    from meswitch.router import EmbeddingRouter, LlmRouter, load_router

    config = Family.load(family)
    source = router or config.resolve(config.router.path)
    loaded = load_router(source, config.base_source(), llm=model)
    updated: LlmRouter | EmbeddingRouter
    if isinstance(loaded, EmbeddingRouter):
        updated = _with_examples(loaded, config.names, source, examples)
    elif not isinstance(loaded, LlmRouter):
        raise ConfigError(f"{source}: kind: only LLM and embedding routers are updated; train this one again")
    elif examples is not None:
        raise ConfigError("--examples: an LLM router chooses by descriptions; give it a better one instead")
    else:
        updated = loaded.with_descriptions({expert.name: expert.description for expert in config.expert})
    target = out or source
    updated.save(target)
    new = [name for name in updated.experts if name not in loaded.experts]
    gone = [name for name in loaded.experts if name not in updated.experts]
    if as_json:
        console.print_json({"router": str(target), "experts": updated.experts, "new": new, "gone": gone})
    else:
        rows = {"router": str(target), "new": ", ".join(new) or "-", "gone": ", ".join(gone) or "-"}
        console.show(console.pairs("", rows))


def _with_examples(
    router: "EmbeddingRouter", names: Sequence[str], source: Path, examples: Path | None
) -> "EmbeddingRouter":
    """The router with the family's new experts."""
    from meswitch.router import add_experts, read_rows

    if examples is None:
        raise ConfigError("--examples: an embedding router learns new experts from rows; give a file of them")
    gone = [name for name in router.experts if name not in names]
    if gone:
        raise ConfigError(f"{source}: {gone[0]!r} is no expert of the family any more; train the router again")
    new = [name for name in names if name not in router.experts]
    rows = read_rows(examples, names)
    for name in new:
        if not any(row.domain == name for row in rows):
            raise ConfigError(f"--examples: {examples} has no rows of {name!r}, which the router does not know")
    return add_experts(router, rows)


@app.command("check")
def check_queries(
    family: FamilyOption,
    data: DataOption,
    eval_data: Annotated[Path, typer.Option(metavar="FILE", help="The rows to measure on.")],
    as_json: JsonOption = False,
) -> None:
    """Which queries are in the training and in the evaluation data?

    Counts rows of --eval-data that equal a row of --data exactly, but for case, spaces and punctuation, or nearly (7 of
    10 runs of three words in common), and how many of those have another domain there. Exits with 1 if there are any.

    Example:

        meswitch router check --family family.toml --data train.jsonl --eval-data dev.jsonl
    """
    from meswitch.family import Family
    from meswitch.router import find_leakage, read_rows
    from meswitch.router.data import drop_duplicates

    names = Family.load(family).names
    rows, held_out = read_rows(data, names), read_rows(eval_data, names)
    found = find_leakage(rows, held_out)
    counts = {"rows": len(held_out), **found.counts(), "duplicates in --data": drop_duplicates(rows)[1]}
    if as_json:
        console.print_json(counts | {"queries": [held_out[i].query for i in found.rows]})
    else:
        console.show(console.pairs("", {name: str(count) for name, count in counts.items()}))
        for i in found.rows[:10]:
            console.note(f"{eval_data}: {held_out[i].query!r:.100}")
    if found.rows:
        raise typer.Exit(1)


def _show_evaluation(result: "Evaluation") -> None:
    from meswitch.router.evaluate import number

    summary = {
        "accuracy": number(result.accuracy),
        "coverage": number(result.coverage),
        "calibration error": number(result.ece),
        "AUROC of other": number(result.auroc),
        "latency": ", ".join(f"{name} {value:.1f} ms" for name, value in result.latency_ms.items()),
    }
    labels = list(result.confusion)
    confusion = console.table("What the router does (other: abstains)", "domain", *labels, "right")
    for domain, row in result.confusion.items():
        confusion.add_row(domain, *(str(row[name]) for name in labels), number(result.per_domain.get(domain)))
    sources = console.table("By source", "source", "right")
    for source, share in result.per_source.items():
        sources.add_row(source, number(share))
    console.show(console.pairs("", summary), confusion, sources)


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
        _show_decision(loaded, decision)


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


def _show_decision(router: "Router", decision: "Route") -> None:
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

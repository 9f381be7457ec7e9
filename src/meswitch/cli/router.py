"""`meswitch router`: train, eval, update and check."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meswitch.cli import console, router_train
from meswitch.cli.route import FamilyOption, ModelOption, RouterOption, ThresholdOption, open_router
from meswitch.cli.router_train import DataOption, DeviceOption, JsonOption, OutOption
from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from meswitch.router import EmbeddingRouter, Evaluation

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
    from meswitch.family import Family
    from meswitch.router import evaluate_router, read_rows
    from meswitch.router.evaluate import draw_plots, markdown

    rows = read_rows(data, Family.load(family).names)
    loaded = open_router(family, router, threshold, model, device)
    result = evaluate_router(loaded, rows)
    drawn = draw_plots(result, plots) if plots is not None else {}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        links = {title: Path(os.path.relpath(file, out.parent)).as_posix() for title, file in drawn.items()}
        out.write_text(
            markdown(result, links) if out.suffix == ".md" else json.dumps(result.to_dict(), indent=2) + "\n"
        )
    if as_json:
        console.print_json(result.to_dict())
    else:
        _show(result)


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
    loaded = load_router(source, config.resolve_model(config.base.path), llm=model)
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


def _show(result: "Evaluation") -> None:
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

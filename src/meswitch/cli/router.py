"""`meswitch router train` and `meswitch router eval`."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meswitch.cli import console
from meswitch.cli.route import FamilyOption, RouterOption, ThresholdOption, open_router

if TYPE_CHECKING:
    from meswitch.router import EmbeddingRouter, Evaluation

app = typer.Typer(no_args_is_help=True, help="Train and measure the router that `model: auto` asks.")

DataOption = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help='JSON lines of `{"query": ..., "domain": ..., "source": ...}`; the domain is an expert\'s name, or '
        "`other` for queries that none of them is for.",
    ),
]


@app.command()
def train(
    family: FamilyOption,
    data: DataOption,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default="what the family says",
            help="Where to write the router. A router that is there is replaced in one step.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which rows are held out together for the calibration.")] = 0,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the encoder runs over the queries.")] = "cpu",
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            show_default="the family's base",
            help="Whose hidden states to read: a directory or hub id of a sentence encoder, a causal LM, or static "
            "embeddings (one safetensors matrix and tokenizer.json).",
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="8 keeps a sentence encoder's linear layers as int8, on the CPU.")] = 32,
    target_precision: Annotated[
        float | None,
        typer.Option(help="Choose the threshold so that this share of what is answered is right, on held-out rows."),
    ] = None,
    target_coverage: Annotated[
        float | None,
        typer.Option(help="Choose the threshold so that this share of the experts' rows is answered."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Train the family's router on labelled queries.

    It reads the base's hidden states and the queries' words; only linear heads are fitted, so this takes seconds.
    Every expert needs at least 5 different queries; a few hundred are better. Rows of `other` teach it when to
    abstain. The figures shown are from rows that were held out (5 folds).

    Example:

        meswitch router train --family family.toml --data train.jsonl
    """
    console.quiet()
    from meswitch.artifact.fingerprint import sha256_file
    from meswitch.family import Family
    from meswitch.router import Encoder, TextEncoder, open_encoder, read_rows, train_router
    from meswitch.router.train import default_settings

    config = Family.load(family)
    rows = read_rows(data, config.names)  # before the model is loaded: a typing error shows at once
    reads: TextEncoder
    if encoder is None:
        reads = Encoder.load(config.resolve_model(config.base.path), console.check_device(device))
    else:
        reads = open_encoder(encoder, console.check_device(device), bits)
    settings = dataclasses.replace(
        default_settings(reads, seed), target_precision=target_precision, target_coverage=target_coverage
    )
    target = out or config.resolve(config.router.path)
    start = time.perf_counter()
    with console.tensor_progress("queries") as advance:
        router = train_router(
            rows,
            config.names,
            reads,
            settings=settings,
            data_sha256=sha256_file(data),
            fallback=config.router.fallback,
            progress=lambda done, total: advance(done, total, ""),
        )
    seconds = time.perf_counter() - start
    router.save(target)
    if as_json:
        rows_used = router.provenance.rows
        held_out = dataclasses.asdict(router.calibration)
        console.print_json({"router": str(target), "rows": rows_used, "held_out": held_out, "seconds": seconds})
    else:
        _show_training(router, target, seconds)


@app.command("eval")
def evaluate(
    family: FamilyOption,
    data: DataOption,
    router: RouterOption = None,
    threshold: ThresholdOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure the family's router on labelled queries.

    `accuracy` asks whether the right expert scores best, abstained or not; rows of `other` do not count there but for
    how well the router tells them apart (auroc). `confusion` counts what the router does, with abstentions in the
    column `other`; `coverage` is the share of the experts' queries that is answered. Measure on other data than it was
    trained on, from other sources if you can: that is what real traffic is.

    Example:

        meswitch router eval --family family.toml --data dev.jsonl --json
    """
    from meswitch.family import Family
    from meswitch.router import evaluate_router, read_rows

    rows = read_rows(data, Family.load(family).names)
    loaded = open_router(family, router, threshold)
    result = evaluate_router(loaded, rows)
    if as_json:
        console.print_json(result.to_dict())
    else:
        _show(result)


def _show_training(router: "EmbeddingRouter", target: Path, seconds: float) -> None:
    calibration = router.calibration
    counts = ", ".join(f"{name} {count}" for name, count in router.provenance.rows.items())
    rows = {
        "router": str(target),
        "rows": counts,
        "held-out accuracy": f"{calibration.accuracy:.4f}",
        "held-out calibration error": f"{calibration.ece:.4f}",
        "held-out AUROC of other": "-" if calibration.auroc is None else f"{calibration.auroc:.4f}",
        "threshold": f"{calibration.threshold:.3f}",
        "seconds": f"{seconds:.1f}",
    }
    console.show(console.pairs("", rows))


def _show(result: "Evaluation") -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

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

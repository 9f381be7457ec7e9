"""`meswitch router train`: one subcommand for each kind of router."""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from meswitch.cli import console
from meswitch.cli.options import option_groups
from meswitch.errors import ConfigError
from meswitch.units import plural

if TYPE_CHECKING:
    from meswitch.family import Family
    from meswitch.router import Row
    from meswitch.router.store import Keepable, ScoreCalibration


class Kinds(TyperGroup):
    """The subcommand may be left out: `default` is meant then. `--kind KIND` may stand for it too."""

    default = "embedding"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for i, word in enumerate(args):
            if word == "--kind" or word.startswith("--kind="):
                kind = word.partition("=")[2] or (args[i + 1] if i + 1 < len(args) else "")
                rest = args[:i] + args[i + (2 if word == "--kind" else 1) :]
                return super().parse_args(ctx, [kind, *rest])
        if args and args[0].startswith("-") and args[0] not in ("--help", "-h"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=Kinds, no_args_is_help=True)


@app.callback()
def train() -> None:
    """Train the family's router.

    What decides is one of these kinds; without a name, `embedding`. Rows of `other` teach a router when to abstain. The
    figures shown are from rows that were held out.

    Examples:

        meswitch router train --family family.toml --data train.jsonl
        meswitch router train --family family.toml --self --data log.jsonl --encoder ./all-MiniLM-L6-v2 --bits 8
        meswitch router train llm --family family.toml --data train.jsonl --model ./SmolLM2 --out llm-router
        meswitch router train cascade --family family.toml --data calib.jsonl --first router --second llm-router
        meswitch router train rules --family family.toml --rules rules.toml --first router
    """


class Weights(StrEnum):
    """What training an LLM router may change."""

    lora = "lora"
    full = "full"
    reference = "reference"


class Leaks(StrEnum):
    """What to do about training rows that the evaluation data has too."""

    drop = "drop"
    refuse = "refuse"
    keep = "keep"


ENOUGH = 50  # held-out rows for an accuracy that says something: at 0.9, two standard errors are 0.08
_ROWS = (
    'JSON lines of `{"query": ..., "domain": ..., "source": ...}`; the domain is an expert\'s name, or `other` for '
    "queries that none of them is for."
)
FamilyOption = Annotated[Path, typer.Option(metavar="FILE", help="A family.toml, or the directory that holds one.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        show_default="where it was when the router was trained; for training, the base",
        help="An LLM router's causal LM: a checkpoint directory or a hub id.",
    ),
]
DataOption = Annotated[Path, typer.Option(metavar="FILE", help=_ROWS)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
DeviceOption = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the model runs.")]
OutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        show_default="what the family says",
        help="Where to write the router. A router that is there is replaced in one step.",
    ),
]


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the router goes."""

    out: OutOption = None
    device: DeviceOption = "cpu"


@dataclass(frozen=True, slots=True)
class Checks:
    """What is done to rows before training."""

    eval_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rows that the router will be measured on; they must not be trained on."),
    ] = None
    leaks: Annotated[
        Leaks,
        typer.Option(help="Training rows that equal, or nearly equal, one of --eval-data: leave out, fail, keep."),
    ] = Leaks.drop
    seed: Annotated[int, typer.Option(help="Decides which rows are held out, and in which order they come.")] = 0


@dataclass(frozen=True, slots=True)
class Claims:
    """Rows that nobody labelled."""

    self_: Annotated[
        bool,
        typer.Option(
            "--self",
            help="Let the experts label the queries of --data, by how sure each is of its answer; labels that are "
            "there do not count. Without --data they write queries first. The family's engine runs for it.",
        ),
    ] = False
    written: Annotated[
        int, typer.Option(min=10, help="With --self and without --data: queries that each expert writes.")
    ] = 100
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --self: also write the rows that come of it to FILE.")
    ] = None


@dataclass(frozen=True, slots=True)
class EmbeddingOptions:
    """Of an embedding router."""

    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            show_default="the family's base",
            help="Whose hidden states to read: a directory or hub id of a sentence encoder, a causal LM, or static "
            "embeddings (one safetensors matrix and tokenizer.json).",
        ),
    ] = None
    bits: Annotated[
        int,
        typer.Option(help="8 keeps a sentence encoder's linear layers as int8, on the CPU."),
    ] = 32
    target_precision: Annotated[
        float | None,
        typer.Option(
            help="Choose the threshold so that this share of what is answered is right, on held-out rows.",
        ),
    ] = None
    target_coverage: Annotated[
        float | None,
        typer.Option(
            help="Choose the threshold so that this share of the experts' rows is answered.",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class LlmOptions:
    """Of an LLM router."""

    model: ModelOption = None
    weights: Annotated[
        Weights,
        typer.Option(
            help="Train adapters (needs `meswitch[lora]`), all weights, or none: then only the threshold is fitted.",
        ),
    ] = Weights.lora
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 300
    batch: Annotated[int, typer.Option(min=1, help="Queries a step.")] = 16
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0.0, show_default="1e-3 for lora, 5e-5 for full", help="At its peak."),
    ] = None
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 16
    top: Annotated[
        float,
        typer.Option(min=0.05, max=1.0, help="Share of the blocks with adapters, from the last."),
    ] = 0.5
    settle: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Share of the steps in which the options pass from the family's order to random ones. 1000 keeps one "
            "order: the least training, but position then carries the answer, and no expert can be added.",
        ),
    ] = 0.25
    max_tokens: Annotated[int, typer.Option(min=8, help="Of a query; of a longer one its beginning and end.")] = 192
    permutations: Annotated[int, typer.Option(min=1, help="Orders of the options that an answer is averaged over.")] = 1
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default="beside --out",
            help="The state of an unfinished training; the same command goes on from there.",
        ),
    ] = None
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50


CascadeFirst = Annotated[Path, typer.Option("--first", metavar="DIR", help="A trained router: asked first.")]
CascadeSecond = Annotated[Path, typer.Option("--second", metavar="DIR", help="A trained router: asked when unsure.")]
RulesFirst = Annotated[
    Path | None, typer.Option("--first", metavar="DIR", help="A trained router: decides what no rule does.")
]
RulesOption = Annotated[
    Path, typer.Option("--rules", metavar="FILE", help="TOML: [[rule]] tables of choose, field and pattern.")
]
AskedOption = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of queries for the second router; 1 asks both always.")
]


@app.command()
@option_groups
def embedding(
    *,
    family: FamilyOption,
    data: Annotated[Path | None, typer.Option(metavar="FILE", show_default="none", help=_ROWS)] = None,
    place: Destination,
    checks: Checks,
    claims: Claims,
    embedding: EmbeddingOptions,
    as_json: JsonOption = False,
) -> None:
    """Linear heads over an encoder's hidden states and the queries' words.

    Seconds to train, milliseconds to ask. Every expert needs 5 different queries; a few hundred are better. Where each
    expert of the family has three `examples` or more, training starts from them.

    Examples:

        meswitch router train --family family.toml --data train.jsonl
        meswitch router train --family family.toml --self --data log.jsonl --encoder ./all-MiniLM-L6-v2 --bits 8
    """
    console.quiet()
    from meswitch.checkpoint import sha256_file
    from meswitch.launch import route_options
    from meswitch.router import Encoder, TextEncoder, open_encoder, read_rows, train_router
    from meswitch.router.train import default_settings

    job = Training.of(family, place)
    if data is None and not claims.self_:
        raise ConfigError("--data: a router of kind embedding is trained on rows; give a file of them, or --self")
    if claims.rows is not None and not claims.self_:
        raise ConfigError("--rows: only with --self, which makes rows")
    if embedding.bits not in (8, 32):
        raise ConfigError(f"--bits: {embedding.bits} is neither 8 nor 32")
    if embedding.bits == 8 and embedding.encoder is None:
        raise ConfigError("--bits: 8 is for a sentence encoder, the base is read as it is; give --encoder DIR too")
    encoder: TextEncoder | None = None
    if embedding.encoder is not None:  # before the experts are asked, which takes longest
        encoder = open_encoder(embedding.encoder, job.device, embedding.bits)
    if claims.self_:
        rows = job.claimed(claims, data, checks.seed)
    else:
        assert data is not None
        rows = read_rows(data, job.family.names)
    rows, leaked = without_leaks(rows, checks, job.family.names)
    if encoder is None:
        encoder = Encoder.load(job.base, job.device)
    settings = dataclasses.replace(
        default_settings(encoder, checks.seed, len(job.family.names)),
        target_precision=embedding.target_precision,
        target_coverage=embedding.target_coverage,
    )
    with console.progress("router") as progress:
        router = train_router(
            rows,
            job.family.names,
            encoder,
            settings=settings,
            options=route_options(job.family),
            data_sha256="" if data is None else sha256_file(data),
            fallback=job.family.router.fallback,
            progress=lambda done, total: progress("reading queries", done, total, ""),
        )
    held_out = figures(router.calibration, rows)  # each row was held out once
    job.finish(router, "embedding", as_json, rows=router.provenance.rows, leaked=leaked, held_out=held_out)


@app.command()
@option_groups
def llm(
    family: FamilyOption,
    data: DataOption,
    place: Destination,
    checks: Checks,
    llm: LlmOptions,
    as_json: JsonOption = False,
) -> None:
    """A chat model answers a multiple-choice question over the experts' descriptions.

    Slower than an embedding router, but a new expert needs no more than a description: `meswitch router update`. Rows
    that are there twice count once.

    Example:

        meswitch router train llm --family family.toml --data train.jsonl --model ./SmolLM2 --out llm-router
    """
    console.quiet()
    from meswitch.checkpoint import sha256_file
    from meswitch.router import LlmSettings, open_llm, read_rows, train_llm_router
    from meswitch.router.data import drop_duplicates, hold_out

    job = Training.of(family, place)
    rows, leaked = without_leaks(read_rows(data, job.family.names), checks, job.family.names)
    rows, duplicates = drop_duplicates(rows)
    settings = LlmSettings(
        weights=llm.weights.value,
        steps=llm.steps,
        batch=llm.batch,
        question=min(4, llm.batch),
        learning_rate=llm.learning_rate or (1e-3 if llm.weights == "lora" else 5e-5),
        rank=llm.rank,
        alpha=2 * llm.rank,
        top=llm.top,
        settle=llm.settle,
        max_tokens=llm.max_tokens,
        permutations=llm.permutations,
        seed=checks.seed,
    )
    state = llm.checkpoint or job.target.with_name(job.target.name + ".training")
    source = job.family.base_source() if llm.model is None else job.family.resolve_model(llm.model, "--model")
    model = open_llm(source, job.device)
    if settings.weights != "reference":
        model.model.float()  # small steps are lost in 16 bit
    with console.progress("router") as progress:
        router = train_llm_router(
            rows,
            {expert.name: expert.description for expert in job.family.expert},
            model,
            settings=settings,
            data_sha256=sha256_file(data),
            fallback=job.family.router.fallback,
            checkpoint=state,
            save_every=llm.save_every,
            report=lambda done, total, loss: progress("training", done, total, f"loss {loss:.3f}"),
        )
    held_out = figures(router.calibration, hold_out(rows, settings.holdout, settings.seed)[1])
    rows_of = router.provenance.rows
    job.finish(router, "llm", as_json, rows=rows_of, duplicates=duplicates, leaked=leaked, held_out=held_out)
    shutil.rmtree(state, ignore_errors=True)  # of no use once the router is written


@app.command()
@option_groups
def cascade(
    family: FamilyOption,
    data: DataOption,
    first: CascadeFirst,
    second: CascadeSecond,
    place: Destination,
    checks: Checks,
    asked: AskedOption = 0.2,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """A cheap router first, a better one where the first is unsure.

    Give --data that neither has seen: it decides what unsure means.

    Example:

        meswitch router train cascade --family family.toml --data calib.jsonl --first router --second llm-router
    """
    console.quiet()
    from collections import Counter

    from meswitch.router import fit_cascade, load_router, read_rows

    job = Training.of(family, place)
    names = job.family.names
    rows, leaked = without_leaks(read_rows(data, names), checks, names)
    one, two = (
        load_router(path, job.base, experts=names, device=job.device, llm=model if path == second else None)
        for path in (first, second)
    )
    router = fit_cascade(one, two, rows, asked=asked if asked < 1 else None, fallback=job.family.router.fallback)
    held_out = figures(router.calibration, rows) | {"margin": router.margin, "weight": router.weight}
    counts = dict(sorted(Counter(row.domain for row in rows).items()))
    job.finish(router, "cascade", as_json, rows=counts, leaked=leaked, held_out=held_out)


@app.command()
@option_groups
def rules(
    family: FamilyOption,
    rules: RulesOption,
    place: Destination,
    first: RulesFirst = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Patterns on the text, headers or metadata decide before any model.

    Example:

        meswitch router train rules --family family.toml --rules rules.toml --first router --out ruled
    """
    console.quiet()
    from meswitch.router import RouterError, RulesRouter, load_router, read_rules

    job = Training.of(family, place)
    names = job.family.names
    behind = None if first is None else load_router(first, job.base, experts=names, device=job.device, llm=model)
    given = read_rules(rules)
    try:
        router = RulesRouter(given, names, behind, fallback=job.family.router.fallback)
    except RouterError as error:
        raise RouterError(f"{rules}: {error}") from None
    job.finish(router, "rules", as_json, held_out={"rules": len(router.rules)})


@dataclass(frozen=True, slots=True)
class Training:
    """One training: of which family, where the router goes, and when it began."""

    family: "Family"
    base: Path
    target: Path
    device: str
    started: float

    @classmethod
    def of(cls, family: Path, place: Destination) -> "Training":
        from meswitch.durable import make_parent
        from meswitch.family import Family

        config = Family.load(family)
        target = place.out or config.resolve(config.router.path)
        make_parent(target)
        device = console.check_device(place.device)
        return cls(config, Path(config.base_source()), target, device, time.perf_counter())

    def claimed(self, claims: Claims, data: Path | None, seed: int) -> list["Row"]:
        """Rows of what the experts claim, of the queries of a file or of what they write themselves."""
        from meswitch.durable import write_text
        from meswitch.launch import engine_from_family
        from meswitch.router.data import claim_queries, read_queries, write_queries

        queries = None if data is None else read_queries(data)
        with engine_from_family(self.family) as engine, console.progress("router") as progress:
            if queries is None:
                progress("writing queries", 0, 0, "")
                queries = write_queries(engine, self.family.names, claims.written, seed)
            told = lambda done, total: progress("asking experts", done, total, f"{len(queries)} queries")  # noqa: E731
            rows = claim_queries(engine, queries, self.family.names, told)
        if claims.rows is not None:
            write_text(claims.rows, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
        return rows

    def finish(
        self,
        router: "Keepable",
        kind: str,
        as_json: bool,
        *,
        rows: Mapping[str, int] | None = None,
        duplicates: int = 0,
        leaked: Mapping[str, int] | None = None,
        held_out: Mapping[str, Any],
    ) -> None:
        """Write the router and say what it is."""
        router.save(self.target)
        told = {
            "router": str(self.target),
            "kind": kind,
            "rows": rows or {},
            "duplicates": duplicates,
            "leaked": leaked or {},
            "held_out": held_out,
            "seconds": time.perf_counter() - self.started,
        }
        if as_json:
            console.print_json(told)
        else:
            _show_training(told)
        count = held_out.get("rows")
        if count is not None and count < ENOUGH:
            console.note(
                f"accuracy was measured on {plural(count, 'row')} only, so it says little; give more rows, or ask "
                "`meswitch router eval` with rows that were not trained on"
            )


def without_leaks(rows: Sequence["Row"], checks: Checks, names: Sequence[str]) -> tuple[list["Row"], dict[str, int]]:
    """Training rows without those that `--eval-data` has too, and how many there were of each kind.

    Raises:
        ConfigError: there are some, and `--leaks` is `refuse`.
    """
    from meswitch.router import find_leakage, read_rows

    if checks.eval_data is None:
        return list(rows), {}
    found = find_leakage(read_rows(checks.eval_data, names), rows)
    counts = found.counts()
    if found.rows and checks.leaks is Leaks.refuse:
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if kind != "conflicts")
        raise ConfigError(
            f"--eval-data: {checks.eval_data} has queries of the training data ({told}); remove them, or "
            "`--leaks drop` to train without them"
        )
    if checks.leaks is Leaks.drop:
        gone = set(found.rows)
        rows = [row for i, row in enumerate(rows) if i not in gone]
    return list(rows), counts


def figures(calibration: "ScoreCalibration", held_out: Sequence["Row"]) -> dict[str, Any]:
    """A calibration, and of how many held-out rows its accuracy is: those that some expert is for."""
    from meswitch.router.base import OTHER

    return dataclasses.asdict(calibration) | {"rows": sum(row.domain != OTHER for row in held_out)}


def _show_training(told: Mapping[str, object]) -> None:
    def text(value: object) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {text(item)}" for name, item in value.items()) or "-"
        return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)

    names = {"held_out": "held-out figures", "leaked": "left out or kept: also in --eval-data"}
    rows = {names.get(name, name): text(value) for name, value in told.items() if value not in ({}, 0)}
    console.show(console.pairs("", rows))

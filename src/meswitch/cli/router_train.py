"""`meswitch router train`: its options, and what it does for each kind of router."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.cli import console
from meswitch.cli.options import option_groups
from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from meswitch.family import Family
    from meswitch.router import LlmSettings, Row
    from meswitch.router.store import Keepable


class Kind(StrEnum):
    """Routers that can be made."""

    embedding = "embedding"
    llm = "llm"
    cascade = "cascade"
    rules = "rules"


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
_EMBEDDING, _LLM, _PAIR = "Embedding router", "LLM router", "Cascade and rules"


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained, on what."""

    data: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default="none; only rules need none", help=_ROWS)
    ] = None
    kind: Annotated[Kind, typer.Option(help="What decides: see below.")] = Kind.embedding
    out: OutOption = None
    eval_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rows that the router will be measured on; they must not be trained on."),
    ] = None
    leaks: Annotated[
        Leaks,
        typer.Option(help="Training rows that equal, or nearly equal, one of --eval-data: leave out, fail, keep."),
    ] = Leaks.drop
    seed: Annotated[int, typer.Option(help="Decides which rows are held out, and in which order they come.")] = 0
    device: DeviceOption = "cpu"


@dataclass(frozen=True, slots=True)
class EmbeddingOptions:
    """Of an embedding router."""

    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_EMBEDDING,
            show_default="the family's base",
            help="Whose hidden states to read: a directory or hub id of a sentence encoder, a causal LM, or static "
            "embeddings (one safetensors matrix and tokenizer.json).",
        ),
    ] = None
    bits: Annotated[
        int,
        typer.Option(
            rich_help_panel=_EMBEDDING, help="8 keeps a sentence encoder's linear layers as int8, on the CPU."
        ),
    ] = 32
    target_precision: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_EMBEDDING,
            help="Choose the threshold so that this share of what is answered is right, on held-out rows.",
        ),
    ] = None
    target_coverage: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_EMBEDDING,
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
            rich_help_panel=_LLM,
            help="Train adapters (needs `meswitch[lora]`), all weights, or none: then only the threshold is fitted.",
        ),
    ] = Weights.lora
    steps: Annotated[int, typer.Option(min=1, rich_help_panel=_LLM, help="Of training.")] = 300
    batch: Annotated[int, typer.Option(min=1, rich_help_panel=_LLM, help="Queries a step.")] = 16
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0.0, rich_help_panel=_LLM, show_default="1e-3 for lora, 5e-5 for full", help="At its peak."),
    ] = None
    rank: Annotated[int, typer.Option(min=1, rich_help_panel=_LLM, help="Of the adapters.")] = 16
    top: Annotated[
        float,
        typer.Option(min=0.05, max=1.0, rich_help_panel=_LLM, help="Share of the blocks with adapters, from the last."),
    ] = 0.5
    settle: Annotated[
        float,
        typer.Option(
            min=0.0,
            rich_help_panel=_LLM,
            help="Share of the steps in which the options pass from the family's order to random ones. 1000 keeps one "
            "order: the least training, but position then carries the answer, and no expert can be added.",
        ),
    ] = 0.25
    max_tokens: Annotated[
        int, typer.Option(min=8, rich_help_panel=_LLM, help="Of a query; of a longer one its beginning and end.")
    ] = 192
    permutations: Annotated[
        int, typer.Option(min=1, rich_help_panel=_LLM, help="Orders of the options that an answer is averaged over.")
    ] = 1
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_LLM,
            show_default="beside --out",
            help="The state of an unfinished training; the same command goes on from there.",
        ),
    ] = None
    save_every: Annotated[int, typer.Option(min=1, rich_help_panel=_LLM, help="Steps between checkpoints.")] = 50


@dataclass(frozen=True, slots=True)
class PairOptions:
    """Of a cascade and of rules."""

    first: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=_PAIR, help="A trained router: asked first, or behind the rules."),
    ] = None
    second: Annotated[
        Path | None, typer.Option(metavar="DIR", rich_help_panel=_PAIR, help="A trained router: asked when unsure.")
    ] = None
    asked: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, rich_help_panel=_PAIR, help="Share of queries for the second router; 1 asks both always."
        ),
    ] = 0.2
    rules: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_PAIR, help="TOML: [[rule]] tables of choose, field and pattern."),
    ] = None


@option_groups
def train(
    family: FamilyOption,
    training: Training,
    embedding: EmbeddingOptions,
    llm: LlmOptions,
    pair: PairOptions,
    as_json: JsonOption = False,
) -> None:
    """Train the family's router on labelled queries.

    - **embedding**: linear heads over an encoder's hidden states and the queries' words. Seconds to train, milliseconds
      to ask. Every expert needs 5 different queries; a few hundred are better.
    - **llm**: a chat model answers a multiple-choice question over the experts' descriptions. Slower, but a new expert
      needs no more than a description: `meswitch router update`.
    - **cascade**: a cheap router first, a better one where the first is unsure. Give --data that neither has seen.
    - **rules**: patterns on the text, headers or metadata decide before any model.

    Rows of `other` teach a router when to abstain. The figures shown are from rows that were held out.

    Examples:

        meswitch router train --family family.toml --data train.jsonl
        meswitch router train --family family.toml --data train.jsonl --kind llm --model ./SmolLM2 --out llm-router
        meswitch router train --family family.toml --data calib.jsonl --kind cascade --first router --second llm-router
    """
    console.quiet()
    from meswitch.family import Family
    from meswitch.router import LlmSettings, read_rows
    from meswitch.router.data import drop_duplicates

    config, kind = Family.load(family), training.kind
    if training.data is None and kind is not Kind.rules:
        raise ConfigError(f"--data: a router of kind {kind} is trained on rows; give a file of them")

    def read(file: Path) -> list["Row"]:
        return read_rows(file, config.names)

    rows = read(training.data) if training.data else []  # before a model is loaded: a typing error shows at once
    rows, leaked = _without_leaks(rows, training.eval_data, training.leaks, read)
    duplicates = 0
    if kind is Kind.llm:
        rows, duplicates = drop_duplicates(rows)
    target = training.out or config.resolve(config.router.path)
    state = llm.checkpoint or target.with_name(target.name + ".training")
    device = console.check_device(training.device)
    job = _Job(config, target, training.data, rows, training.seed, device)
    start = time.perf_counter()
    if kind is Kind.llm:
        settings = LlmSettings(
            weights=llm.weights,
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
            seed=training.seed,
        )
        trained = _llm_router(job, llm.model, settings, state, llm.save_every)
    elif kind is Kind.cascade:
        trained = _cascade_router(job, pair.first, pair.second, pair.asked, llm.model)
    elif kind is Kind.rules:
        trained = _rules_router(job, pair.rules, pair.first, llm.model)
    else:
        precision, coverage = embedding.target_precision, embedding.target_coverage
        trained = _embedding_router(job, embedding.encoder, embedding.bits, precision, coverage)
    _finish(trained, target, state)
    told = {
        "router": str(target),
        "kind": kind.value,
        "rows": trained.rows,
        "duplicates": duplicates,
        "leaked": leaked,
        "held_out": trained.held_out,
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        console.print_json(told)
    else:
        _show_training(told)


def _show_training(told: Mapping[str, object]) -> None:
    def text(value: object) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {text(item)}" for name, item in value.items()) or "-"
        return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)

    names = {"held_out": "held-out figures", "leaked": "left out or kept: also in --eval-data"}
    rows = {names.get(name, name): text(value) for name, value in told.items() if value not in ({}, 0)}
    console.show(console.pairs("", rows))


@dataclass(frozen=True)
class _Job:
    """One training. target: where the router goes. data, rows: a file and what is left of it after the checks."""

    family: "Family"
    target: Path
    data: Path | None
    rows: Sequence["Row"]
    seed: int
    device: str


@dataclass(frozen=True)
class _Trained:
    """A router, and what to say about it: counts of rows by domain and held-out figures."""

    router: "Keepable"
    rows: dict[str, int]
    held_out: dict[str, Any]


def _embedding_router(
    job: _Job, source: str | None, bits: int, target_precision: float | None, target_coverage: float | None
) -> _Trained:
    from meswitch.artifact.fingerprint import sha256_file
    from meswitch.launch import route_options
    from meswitch.router import Encoder, TextEncoder, open_encoder, train_router
    from meswitch.router.train import default_settings

    assert job.data is not None
    config = job.family
    encoder: TextEncoder
    if source is None:
        encoder = Encoder.load(config.resolve_model(config.base.path), job.device)
    else:
        encoder = open_encoder(source, job.device, bits)
    settings = dataclasses.replace(
        default_settings(encoder, job.seed, len(config.names)),
        target_precision=target_precision,
        target_coverage=target_coverage,
    )
    with console.progress("router") as progress:
        router = train_router(
            job.rows,
            config.names,
            encoder,
            settings=settings,
            options=route_options(config),
            data_sha256=sha256_file(job.data),
            fallback=config.router.fallback,
            progress=lambda done, total: progress("reading queries", done, total, ""),
        )
    return _Trained(router, router.provenance.rows, dataclasses.asdict(router.calibration))


def _llm_router(job: _Job, model: str | None, settings: "LlmSettings", checkpoint: Path, save_every: int) -> _Trained:
    from meswitch.artifact.fingerprint import sha256_file
    from meswitch.router import open_llm, train_llm_router

    assert job.data is not None
    config = job.family
    source = config.resolve_model(model or config.base.path)
    llm = open_llm(source, job.device)
    if settings.weights != "reference":
        llm.model.float()  # small steps are lost in 16 bit
    with console.progress("router") as progress:
        router = train_llm_router(
            job.rows,
            {expert.name: expert.description for expert in config.expert},
            llm,
            settings=settings,
            data_sha256=sha256_file(job.data),
            fallback=config.router.fallback,
            checkpoint=checkpoint,
            save_every=save_every,
            report=lambda done, total, loss: progress("training", done, total, f"loss {loss:.3f}"),
        )
    return _Trained(router, router.provenance.rows, dataclasses.asdict(router.calibration))


def _cascade_router(job: _Job, first: Path | None, second: Path | None, asked: float, model: str | None) -> _Trained:
    from collections import Counter

    from meswitch.router import fit_cascade, load_router

    if first is None or second is None:
        raise ConfigError("--kind cascade: needs --first DIR and --second DIR, two routers that are trained already")
    config = job.family
    base = config.resolve_model(config.base.path)
    one, two = (
        load_router(path, base, experts=config.names, device=job.device, llm=model if path == second else None)
        for path in (first, second)
    )
    router = fit_cascade(one, two, job.rows, asked=asked if asked < 1 else None, fallback=config.router.fallback)
    held_out = dataclasses.asdict(router.calibration) | {"margin": router.margin, "weight": router.weight}
    return _Trained(router, dict(sorted(Counter(row.domain for row in job.rows).items())), held_out)


def _rules_router(job: _Job, file: Path | None, first: Path | None, model: str | None) -> _Trained:
    from meswitch.router import RulesRouter, load_router, read_rules

    if file is None:
        raise ConfigError("--kind rules: needs --rules FILE, a TOML file of [[rule]] tables")
    config = job.family
    base = config.resolve_model(config.base.path)
    behind = None if first is None else load_router(first, base, experts=config.names, device=job.device, llm=model)
    router = RulesRouter(read_rules(file), config.names, behind, fallback=config.router.fallback)
    return _Trained(router, {}, {"rules": len(router.rules)})


def _finish(trained: _Trained, target: Path, checkpoint: Path) -> None:
    """Write the router; only then is the checkpoint of no use."""
    trained.router.save(target)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _without_leaks(
    rows: Sequence["Row"], eval_data: Path | None, leaks: str, read: Callable[[Path], list["Row"]]
) -> tuple[list["Row"], dict[str, int]]:
    """Training rows without those that `eval_data` has too, and how many there were of each kind.

    Raises:
        ConfigError: there are some, and `leaks` is `refuse`.
    """
    from meswitch.router import find_leakage

    if eval_data is None:
        return list(rows), {}
    found = find_leakage(read(eval_data), rows)
    counts = found.counts()
    if found.rows and leaks == "refuse":
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if kind != "conflicts")
        raise ConfigError(
            f"--eval-data: {eval_data} has queries of the training data ({told}); remove them, or `--leaks drop` to "
            "train without them"
        )
    if leaks == "drop":
        gone = set(found.rows)
        rows = [row for i, row in enumerate(rows) if i not in gone]
    return list(rows), counts

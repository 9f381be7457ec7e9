"""`meswitch router train`."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meswitch.cli import console, router_kinds
from meswitch.cli.options import option_groups
from meswitch.cli.route import FamilyOption, ModelOption
from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from meswitch.router import Row


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
    rows, leaked = router_kinds.without_leaks(rows, training.eval_data, training.leaks, read)
    duplicates = 0
    if kind is Kind.llm:
        rows, duplicates = drop_duplicates(rows)
    target = training.out or config.resolve(config.router.path)
    state = llm.checkpoint or target.with_name(target.name + ".training")
    device = console.check_device(training.device)
    job = router_kinds.TrainingJob(config, target, training.data, rows, training.seed, device)
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
        trained = router_kinds.llm(job, llm.model, settings, state, llm.save_every)
    elif kind is Kind.cascade:
        trained = router_kinds.cascade(job, pair.first, pair.second, pair.asked, llm.model)
    elif kind is Kind.rules:
        trained = router_kinds.rules(job, pair.rules, pair.first, llm.model)
    else:
        precision, coverage = embedding.target_precision, embedding.target_coverage
        trained = router_kinds.embedding(job, embedding.encoder, embedding.bits, precision, coverage)
    router_kinds.finish(trained, target, state)
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

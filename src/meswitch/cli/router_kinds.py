"""What `meswitch router train` does for each kind of router."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meswitch.cli import console
from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from meswitch.family import Family
    from meswitch.router import LlmSettings, Row
    from meswitch.router.store import Keepable


@dataclass(frozen=True)
class TrainingJob:
    """One training. target: where the router goes. data, rows: a file and what is left of it after the checks."""

    family: "Family"
    target: Path
    data: Path | None
    rows: Sequence["Row"]
    seed: int
    device: str


@dataclass(frozen=True)
class Trained:
    """A router, and what to say about it: counts of rows by domain and held-out figures."""

    router: "Keepable"
    rows: dict[str, int]
    held_out: dict[str, Any]


def embedding(
    job: TrainingJob, source: str | None, bits: int, target_precision: float | None, target_coverage: float | None
) -> Trained:
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
    return Trained(router, router.provenance.rows, dataclasses.asdict(router.calibration))


def llm(job: TrainingJob, model: str | None, settings: "LlmSettings", checkpoint: Path, save_every: int) -> Trained:
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
    return Trained(router, router.provenance.rows, dataclasses.asdict(router.calibration))


def cascade(job: TrainingJob, first: Path | None, second: Path | None, asked: float, model: str | None) -> Trained:
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
    return Trained(router, dict(sorted(Counter(row.domain for row in job.rows).items())), held_out)


def rules(job: TrainingJob, file: Path | None, first: Path | None, model: str | None) -> Trained:
    from meswitch.router import RulesRouter, load_router, read_rules

    if file is None:
        raise ConfigError("--kind rules: needs --rules FILE, a TOML file of [[rule]] tables")
    config = job.family
    base = config.resolve_model(config.base.path)
    behind = None if first is None else load_router(first, base, experts=config.names, device=job.device, llm=model)
    router = RulesRouter(read_rules(file), config.names, behind, fallback=config.router.fallback)
    return Trained(router, {}, {"rules": len(router.rules)})


def finish(trained: Trained, target: Path, checkpoint: Path) -> None:
    """Write the router; only then is the checkpoint of no use."""
    trained.router.save(target)
    shutil.rmtree(checkpoint, ignore_errors=True)


def without_leaks(
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

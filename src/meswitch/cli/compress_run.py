"""What `meswitch compress` does: one pair, or the experts of a family."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meswitch.cli import console
from meswitch.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from meswitch.artifact import Artifact
    from meswitch.family import ExpertSection


def compress_family(
    file: Path, names: list[str], calibration: str | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """calibration: `self` or `none` for all experts; None for what the file says."""
    from meswitch.compression.text import Source
    from meswitch.family import Family

    family = Family.load(file)
    experts = [family.get(name) for name in names] or list(family.expert)
    wanted = family.compress
    settings = {
        "bits": wanted.bits,
        "salient": wanted.salient,
        "group_size": None if wanted.group_size == "row" else wanted.group_size,
        "embeddings": wanted.embeddings,
        "target_bpw": wanted.target_bpw,
    }
    if wanted.target_bpw is not None:  # then these are chosen for each tensor
        del settings["bits"], settings["salient"]
    rows = []
    for section in experts:
        out = family.resolve(section.delta)
        present = None if options["overwrite"] else _present(file, section, out)
        if present is not None:
            differing = [key for key, value in settings.items() if getattr(present.manifest.method, key) != value]
            hint = f", although its {', '.join(differing)} differ from {file}'s" if differing else ""
            console.note(f"{section.name}: {out} is kept{hint}; --overwrite makes it anew")
            rows.append(_row(section.name, present, None, []))
            continue
        if section.source is None:
            raise ConfigError(f"{file}: expert {section.name!r}: source: is needed to compress it")
        wanted_text = calibration or section.calibration
        own: dict[str, Any] = {
            "calibration": None
            if wanted_text in (None, "none")
            else Source.parse(str(wanted_text)).resolved(family.resolve),
            "overwrite": options["overwrite"] or out.exists(),  # what exists here is a damaged artifact
        }
        own["distill"] = 0 if own["calibration"] is None else wanted.distill
        own["distill_scope"] = None if own["calibration"] is None else wanted.distill_scope
        base, source = family.resolve_model(family.base.path), family.resolve_model(section.source)
        rows.append(compress_one(section.name, base, source, out, options | settings | own))
    return rows


def _present(file: Path, section: "ExpertSection", out: Path) -> "Artifact | None":
    """The artifact that is there already; None if there is none, or a damaged one."""
    from meswitch.artifact import Artifact
    from meswitch.artifact.manifest import MANIFEST_NAME

    if not out.exists():
        return None
    if not (out / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"{file}: expert {section.name!r}: delta: {out} exists and is not an artifact; "
            "move it away or choose another path"
        )
    try:
        return Artifact.open(out)
    except ArtifactError as error:
        console.note(f"{section.name}: made anew, because {error}")
        return None


def compress_one(name: str, base: str, expert: str, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    from meswitch.compression import compress as run

    notices: list[str] = []

    def notice(line: str) -> None:
        notices.append(line)
        console.note(f"{name}: {line}")

    started = time.perf_counter()
    with console.tensor_progress(name) as progress:
        artifact = run(base, expert, out, progress=progress, notice=notice, **options)
    return _row(name, artifact, time.perf_counter() - started, notices)


def _row(name: str, artifact: "Artifact", seconds: float | None, notices: list[str]) -> dict[str, Any]:
    full = artifact.manifest.expert.bytes
    return {
        "expert": name,
        "artifact": str(artifact.directory),
        "skipped": seconds is None,
        "full_bytes": full,
        "tensor_bytes": artifact.nbytes,
        "disk_bytes": artifact.disk_bytes,
        "ratio": full / artifact.nbytes if artifact.nbytes else None,
        "bits_per_weight": artifact.bits_per_weight,
        "seconds": seconds,
        "notices": notices,
    }

"""`meswitch compress`: a fine-tune becomes an artifact of its difference from the base."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from meswitch.cli import console
from meswitch.errors import ArtifactError, ConfigError
from meswitch.units import format_bytes

if TYPE_CHECKING:
    from meswitch.artifact import Artifact
    from meswitch.family import ExpertSection


def compress(
    base: Annotated[
        str | None, typer.Option(metavar="DIR|HUB_ID", help="The base checkpoint, as a directory or a hub id.")
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|HUB_ID|NAME",
            help="The full fine-tune of the base. With `--family`: the name of an expert to compress, repeatable; "
            "all experts if left out.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The directory to create. It gets its name only when everything in it is complete."
        ),
    ] = None,
    family: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A family.toml: compress its experts to where it says, with the settings of its `[compress]`. "
            "Experts that are compressed already are kept.",
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4,
            help="Bits of a code, 2 by default. Each bit more costs one bit a weight and leaves less than half of the "
            "error: 1 does for small deltas, 4 is close to exact.",
        ),
    ] = None,
    salient: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=0,
            help="Input channels of each linear layer that stay 16 bit, the ones whose rounding costs most. By default "
            "one in 512, at least one: 0.03 bits a weight.",
        ),
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            metavar="G|row",
            help="Input channels that share a 16-bit scale, 64 by default. It costs 16/G bits a weight: a smaller G "
            "follows the weights better; `row` is one scale a row.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|none",
            help="Text like the expert's own inputs (.txt: one a line; .jsonl: `text`, `messages` or `prompt`). "
            "It chooses the salient channels and corrects rounding errors, in one forward pass of the expert. "
            "`none`, the default without `--family`, is data-free: faster, and worse at 1 and 2 bits.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Use at most so many tokens of it; more cost time, not bytes.")
    ] = 32768,
    distill: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            min=0,
            help="Train scales, salient weights and norms against the full expert on the calibration text for so many "
            "steps; 0 does not. It costs no bytes, closes much of the gap at 1 and 2 bits, and needs both models in "
            "memory. Default: 100 with calibration text if the expert has at most 256 MB, else 0.",
        ),
    ] = None,
    embeddings: Annotated[
        Literal["quantised", "exact"] | None,
        typer.Option(
            help="`quantised`, the default, treats embedding and head like every other matrix; `exact` keeps them as "
            "they are, at their full size. Rows of added tokens are exact either way.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="`me-switch`, the default, or another method to compare it with: `rtn`, `bitdelta`, `svd`, "
            "`per-axis`, `delta-come`, `deltazip`, `dare`. All but `rtn` can be merged and evaluated, not served.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", min=1, help="Of `svd`. Default: what fits in the bytes of the default method."),
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(metavar="P", min=0, max=1, help="Share of weights that `dare` drops, 0.9 by default."),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="cpu|cuda", help="Where the arithmetic runs. One tensor at a time is there.")
    ] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact that exists. Other directories are never touched.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compress a full fine-tune into its difference from the base.

    The artifact holds everything that makes the expert: packed deltas, norms, added tokens, tokenizer, chat
    template. An interrupted run goes on where it stopped when the same command is given again, and leaves nothing
    that could be mistaken for a whole artifact.

    Examples:

        meswitch compress --base B --expert B-math --out deltas/math
        meswitch compress --base B --expert B-math --out deltas/math \\
            --bits 3 --calibration math.jsonl
        meswitch compress --family family.toml
    """
    settings = {
        "--bits": bits, "--salient": salient, "--group-size": group_size, "--embeddings": embeddings, "--out": out,
        "--base": base, "--distill": distill, "--method": method, "--rank": rank, "--drop": drop,
    }  # fmt: skip
    if family is not None:
        for option, value in settings.items():
            if value is not None and option in ("--method", "--rank", "--drop"):
                raise ConfigError(f"{option}: a family is served, by the default method; compress a single --expert")
            if value is not None:
                raise ConfigError(f"{option}: {family} says this for its experts; change it there")
        if calibration not in (None, "none"):
            raise ConfigError(f"--calibration: {family} names each expert's text; change it there, or give `none`")
    else:
        if base is None or out is None or not expert:
            raise ConfigError("--base, --expert and --out are needed, or --family; see `meswitch compress --help`")
        if len(expert) > 1:
            raise ConfigError("--expert: one at a time; a family.toml (--family) compresses several")
    options: dict[str, Any] = {
        "calibration_tokens": calibration_tokens,
        "device": console.check_device(device),
        "overwrite": overwrite,
    }
    console.quiet()
    if family is not None:
        rows = _compress_family(family, expert or [], calibration == "none", options)
        result: Any = rows
    else:
        options |= {
            "bits": 2 if bits is None else bits,
            "salient": salient,
            "group_size": _group_size(group_size),
            "embeddings": embeddings,
            "method": method or "me-switch",
            "rank": rank,
            "drop": drop,
            "distill": distill,
            "calibration": None if calibration in (None, "none") else calibration,
        }
        assert expert is not None
        result = _compress_one(Path(expert[0]).name, str(base), expert[0], Path(str(out)), options)
        rows = [result]
    if as_json:
        console.print_json(result)
    else:
        console.show(_table(rows))


def _compress_family(file: Path, names: list[str], data_free: bool, options: dict[str, Any]) -> list[dict[str, Any]]:
    from meswitch.family import Family

    family = Family.load(file)
    experts = [family.get(name) for name in names] or list(family.expert)
    wanted = family.compress
    settings = {
        "bits": wanted.bits,
        "salient": wanted.salient,
        "group_size": None if wanted.group_size == "row" else wanted.group_size,
        "embeddings": wanted.embeddings,
    }
    rows = []
    for section in experts:
        out = family.resolve(section.delta)
        present = None if options["overwrite"] else _present(file, section, out)
        if present is not None:
            differing = [key for key, value in settings.items() if getattr(present.manifest.method, key) != value]
            hint = f", although its {', '.join(differing)} differ from {file}'s" if differing else ""
            console.note(f"{section.name}: {out} is kept{hint}; --overwrite makes it anew")
            rows.append(_row(section.name, present, None))
            continue
        if section.source is None:
            raise ConfigError(f"{file}: expert {section.name!r}: source: is needed to compress it")
        calibration = section.calibration
        own: dict[str, Any] = {
            "calibration": None if data_free or calibration is None else family.resolve(calibration),
            "overwrite": options["overwrite"] or out.exists(),  # what exists here is a damaged artifact
        }
        own["distill"] = 0 if own["calibration"] is None else wanted.distill
        base, source = family.resolve_model(family.base.path), family.resolve_model(section.source)
        rows.append(_compress_one(section.name, base, source, out, options | settings | own))
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


def _compress_one(name: str, base: str, expert: str, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    from meswitch.compression import compress as run

    started = time.perf_counter()
    with console.tensor_progress(name) as progress:
        artifact = run(base, expert, out, progress=progress, **options)
    return _row(name, artifact, time.perf_counter() - started)


def _row(name: str, artifact: "Artifact", seconds: float | None) -> dict[str, Any]:
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
    }


def _table(rows: list[dict[str, Any]]) -> Any:
    made = console.table("", "expert", "full", "compressed", "smaller", "bits/weight", "all files", "seconds")
    for row in rows:
        made.add_row(
            row["expert"],
            format_bytes(row["full_bytes"]),
            format_bytes(row["tensor_bytes"]),
            f"{row['ratio']:.2f}x" if row["ratio"] else "-",
            f"{row['bits_per_weight']:.3f}",
            format_bytes(row["disk_bytes"]),
            "kept" if row["skipped"] else f"{row['seconds']:.1f}",
        )
    return made


def _group_size(text: str | None) -> int | None:
    if text == "row":
        return None
    if text is not None and not text.isdigit():
        raise ConfigError(f"--group-size: {text!r} is neither a number nor `row`")
    return 64 if text is None else int(text)

"""`meswitch compress`: a fine-tune becomes an artifact of its difference from the base."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.cli import console
from meswitch.cli.options import flag, option_groups, takes
from meswitch.compression.options import Options, check_none_given, given_options
from meswitch.errors import ArtifactError, ConfigError
from meswitch.units import format_bytes

if TYPE_CHECKING:
    from meswitch.artifact import Artifact
    from meswitch.compression.recipe import Again
    from meswitch.family import ExpertSection

_BESIDE_A_FAMILY = ("calibration", "calibration_tokens")


@dataclass(frozen=True, slots=True)
class Run:
    """How a compression runs."""

    device: Annotated[
        str, typer.Option(metavar="cpu|cuda", help="Where the arithmetic runs. One tensor at a time is there.")
    ] = "cpu"
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact that exists. Other directories are never touched.")
    ] = False
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Go on although the expert is of another base: every matrix moved by more than 1.2 of its norm.",
        ),
    ] = False

    def where(self) -> dict[str, Any]:
        """As `compress_one` takes it. Raises: ConfigError: no such device."""
        return {"device": console.check_device(self.device), "overwrite": self.overwrite, "force": self.force}


@takes()
@option_groups
def compress_command(
    base: Annotated[
        str | None, typer.Option(metavar="DIR|HUB_ID", help="The base checkpoint, as a directory or a hub id.")
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|HUB_ID|NAME",
            help="The full fine-tune of the base, or a PEFT adapter of it, which is kept as it was trained. With "
            "`--family`: the name of an expert to compress, repeatable; all experts if left out.",
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
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="ARTIFACT|FILE",
            help="With all options of an artifact's compression, which its manifest has; or those of a TOML file, by "
            "name. Options given beside it count instead. --base and --expert may be left out where they were hub ids.",
        ),
    ] = None,
    given: Mapping[str, Any] = {},
    run: Run = Run(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compress a full fine-tune into its difference from the base.

    The artifact holds everything that makes the expert: packed deltas, norms, added tokens, tokenizer, chat
    template. An interrupted run goes on where it stopped when the same command is given again, and leaves nothing
    that could be mistaken for a whole artifact.

    Examples:

        meswitch compress --base B --expert B-math --out deltas/math
        meswitch compress --base B --expert B-math --out deltas/math \\
            --target-bpw 2.3 --calibration math.jsonl
        meswitch compress --base B --expert B-rl --out deltas/rl --bits exact
        meswitch compress --base B --expert B-math-2 --out deltas/math-2 --recipe deltas/math
        meswitch compress --family family.toml
    """
    where = run.where()
    if family is not None:
        _check_beside_a_family(family, {"base": base, "out": out, "recipe": recipe} | dict(given))
        console.quiet()
        rows = _compress_family(family, expert or [], given, where)
    else:
        if recipe is not None:
            again = _again(recipe, given)
            base, expert, given = (
                base or again.base,
                expert or ([again.expert] if again.expert else None),
                again.options,
            )
        if base is None or out is None or not expert:
            needed = {"--base": base, "--expert": expert, "--out": out}
            left_out = ", ".join(option for option, value in needed.items() if not value)
            raise ConfigError(f"{left_out}: needed beside the others, or give a family.toml (--family) instead of all")
        if len(expert) > 1:
            raise ConfigError("--expert: one at a time; a family.toml (--family) compresses several")
        console.quiet()
        from meswitch.adapter import is_adapter

        if is_adapter(expert[0]):
            check_none_given(given, expert[0])
        rows = [compress_one(Path(expert[0]).name, base, expert[0], out, given_options(given), where)]
    if as_json:
        console.print_json(rows if family is not None else rows[0])
    else:
        console.show(compressed_table(rows))


def _again(source: Path, given: Mapping[str, Any]) -> "Again":
    """A recipe with what is given beside it.

    Raises:
        ConfigError: its calibration text is not here.
    """
    from meswitch.artifact.fingerprint import sha256_file
    from meswitch.compression.recipe import read_recipe
    from meswitch.compression.text import TextSource

    recipe = read_recipe(source)
    options = recipe.options | dict(given)
    if isinstance(options.get("calibration"), str):
        text = TextSource.parse(options["calibration"])
        for file in filter(None, (text.text, text.questions)):
            if not file.is_file():
                raise ConfigError(f"{recipe.source}: recipe: calibration: {file} is not here; give --calibration FILE")
        same = text.text is None or recipe.calibration_sha256 in (None, sha256_file(text.text))
        if not same:
            console.note(f"{text.text}: is not the text that {recipe.source} was calibrated on (another SHA-256)")
    return dataclasses.replace(recipe, options=options)


def _check_beside_a_family(file: Path, given: Mapping[str, Any]) -> None:
    """Refuse what a family.toml says itself."""
    for name, value in given.items():
        if value is not None and name not in _BESIDE_A_FAMILY:
            raise ConfigError(f"{flag(name)}: {file} says this for its experts; change it there")
    if given.get("calibration") not in (None, "self"):
        raise ConfigError(f"--calibration: {file} names each expert's text; change it there, or give `self` or `none`")


def _compress_family(
    file: Path, names: list[str], given: Mapping[str, Any], where: dict[str, Any]
) -> list[dict[str, Any]]:
    """given: calibration, for all experts (None is none), and its tokens; what is missing is as the file says."""
    from meswitch.adapter import METHOD, is_adapter, open_expert
    from meswitch.artifact import Artifact
    from meswitch.checkpoint import Checkpoint
    from meswitch.compression.text import TextSource
    from meswitch.family import Family

    family = Family.load(file)
    experts = [family.get(name) for name in names] or list(family.expert)
    said = family.compress.given()
    untrained = {} if said.get("bits") == "exact" else {"distill": 0, "distill_scope": None}
    rows = []
    for section in experts:
        if section.delta.startswith("hf://"):
            console.note(f"{section.name}: {section.delta} is on the hub: there is nothing to compress")
            rows.append(_row(section.name, Artifact.open(section.delta), None, []))
            continue
        out = family.resolve(section.delta)
        if is_adapter(out):
            console.note(f"{section.name}: {out} is a PEFT adapter and served as it is: there is nothing to compress")
            served = open_expert(out, Checkpoint.open(family.resolve_model(family.base.path)))
            rows.append(_row(section.name, served, None, []) | {"artifact": str(out)})
            continue
        present = None if where["overwrite"] else _present(file, section, out)
        if present is not None:
            wanted, found = given_options(said | untrained).describe(None), present.manifest.method
            differing = [
                item.name
                for item in dataclasses.fields(wanted)
                if found.name != METHOD
                and item.name not in ("calibration", "distillation")
                and getattr(wanted, item.name) != getattr(found, item.name)
            ]
            hint = f", although its {', '.join(differing)} differ from {file}'s" if differing else ""
            console.note(f"{section.name}: {out} is kept{hint}; --overwrite makes it anew")
            rows.append(_row(section.name, present, None, []))
            continue
        if section.source is None:
            raise ConfigError(f"{file}: expert {section.name!r}: source: is needed to compress it")
        text = given.get("calibration", section.calibration)
        own = said | dict(given) | {"calibration": None}
        if text in (None, "none"):  # then nothing can be trained
            own |= untrained
        else:
            own["calibration"] = TextSource.parse(str(text)).resolved(family.resolve)
        base, source = family.resolve_model(family.base.path), family.resolve_model(section.source)
        replace = where | {"overwrite": where["overwrite"] or out.exists()}  # what exists here is a damaged artifact
        options = Options() if is_adapter(source) else given_options(own)  # an adapter is kept as it was trained
        rows.append(compress_one(section.name, base, source, out, options, replace))
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


def compress_one(
    name: str, base: str, expert: str, out: Path, options: Options, where: dict[str, Any]
) -> dict[str, Any]:
    from meswitch.compression.pipeline import compress as run

    notices: list[str] = []

    def notice(line: str) -> None:
        notices.append(line)
        console.note(f"{name}: {line}")

    started = time.perf_counter()
    with console.progress(name) as progress:
        artifact = run(base, expert, out, options, progress=progress, notice=notice, **where)
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


def compressed_table(rows: list[dict[str, Any]]) -> Any:
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

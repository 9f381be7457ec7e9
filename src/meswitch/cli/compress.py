"""`meswitch compress` and `extract-lora`: a fine-tune's difference from its base, or the nearest LoRA."""

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
from meswitch.units import format_bytes, plural

if TYPE_CHECKING:
    from meswitch.artifact import Artifact
    from meswitch.compression.extraction import Energy, Extraction
    from meswitch.compression.options import Again
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
    from meswitch.checkpoint import sha256_file
    from meswitch.compression.options import read_recipe
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
    rows: list[dict[str, Any]] = []
    jobs = []  # what a person got wrong is said before the first of them begins
    for section in experts:
        if section.delta.startswith("hf://"):
            console.note(f"{section.name}: {section.delta} is on the hub: there is nothing to compress")
            rows.append(_row(section.name, Artifact.open(section.delta), None, []))
            continue
        out = family.resolve(section.delta)
        if is_adapter(out):
            console.note(f"{section.name}: {out} is a PEFT adapter and served as it is: there is nothing to compress")
            served = open_expert(out, Checkpoint.open(family.base_source()))
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
        base, source = family.base_source(), family.source_of(section)
        text = given.get("calibration", section.calibration)
        own = said | dict(given) | {"calibration": None}
        if text in (None, "none"):  # then nothing can be trained
            own |= untrained
        else:
            own["calibration"] = wanted_text = TextSource.parse(str(text)).resolved(family.resolve)
            for place in (wanted_text.text, wanted_text.questions):
                if place is not None and not place.is_file():
                    raise ConfigError(
                        f"{file}: expert {section.name!r}: calibration: {place}: no such file; give a .txt, .jsonl or "
                        ".json file, or `none`"
                    )
        replace = where | {"overwrite": where["overwrite"] or out.exists()}  # what exists here is a damaged artifact
        options = Options() if is_adapter(source) else given_options(own)  # an adapter is kept as it was trained
        jobs.append((len(rows), (section.name, base, source, out, options, replace)))
        rows.append({})
    for index, job in jobs:
        rows[index] = compress_one(*job)
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


_NAMED = 3


def extract_lora_command(
    base: Annotated[str, typer.Option(metavar="DIR|HUB_ID", help="The base checkpoint.")],
    expert: Annotated[str, typer.Option(metavar="DIR|HUB_ID", help="A full fine-tune of it.")],
    rank: Annotated[
        int,
        typer.Option(
            metavar="R",
            min=1,
            help="Of every pair: R (rows + columns) weights for each matrix. Servers take 8 to 64 gladly, more at a "
            "price in speed; a full fine-tune's delta seldom fits, and `kept` says how much does.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The adapter's directory to create.")],
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text like the expert's own inputs, as for `compress`. Pairs are then those that change the layers' "
            "outputs on it most nearly as the delta does: the same bytes keep more of what the model says. It costs a "
            "forward pass of the expert, one block in memory at a time.",
        ),
    ] = None,
    modules_to_save: Annotated[
        bool,
        typer.Option(
            "--modules-to-save",
            help="Keep embeddings, norms and routers that changed whole, and added tokens with them, as PEFT's "
            "`modules_to_save`. PEFT and meswitch read that; vLLM refuses such an adapter.",
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="cpu|cuda", help="Where singular vectors are computed, one matrix at a time.")
    ] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that exists. Other directories are never touched.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every tensor included.")] = False,
) -> None:
    """Extract the nearest LoRA adapter from a full fine-tune, for servers that have nothing else.

    Each linear layer's delta is replaced by the pair of rank R that is nearest to it: its largest singular values and
    their vectors. `kept` is the share of the delta's energy (the sum of its squares) that the pair has, `of outputs`
    the share of what it adds to the layers' outputs on --calibration text; the rest of the fine-tuning is lost. A full
    fine-tune spreads over many singular values, so compare what this keeps with what `meswitch compress` does at the
    same bytes. A LoRA has no place for norms, biases and embeddings: what of them changed is kept whole with
    --modules-to-save, or named as left out.

    Example:

        meswitch extract-lora --base B --expert B-math --rank 64 --calibration math.jsonl --out adapters/math
    """
    device = console.check_device(device)
    console.quiet()
    from meswitch.compression.extraction import LoraOptions
    from meswitch.compression.extraction import extract_lora as run

    options = LoraOptions(rank, calibration, modules_to_save)
    started = time.perf_counter()
    with console.progress("extract-lora") as progress:
        found = run(
            base,
            expert,
            out,
            options,
            device=device,
            overwrite=overwrite,
            progress=progress,
            notice=console.note,
        )
    seconds = time.perf_counter() - started
    if as_json:
        console.print_json(extraction_json(found) | {"seconds": seconds})
    else:
        _show(found, seconds)


def extraction_json(found: "Extraction") -> dict[str, Any]:
    """The whole result, with sums and shares worked out."""
    from meswitch.compression.extraction import LEFT_OUT, PAIR, WHOLE

    def plain(energy: "Energy") -> dict[str, Any]:
        return dataclasses.asdict(energy) | {"share": energy.share, "output_share": energy.output_share}

    return {
        "adapter": str(found.directory),
        "rank": found.rank,
        "bytes": found.nbytes,
        "full_bytes": found.full_bytes,
        "linear_layers": plain(found.of(PAIR)),
        "all": plain(found.of(PAIR, WHOLE, LEFT_OUT)),
        "by_type": [{"how": how, "layer": layer} | plain(energy) for (how, layer), energy in found.by_type().items()],
        "added_rows": found.added_rows,
        "added_rows_kept": found.added_kept,
        "tensors": [dataclasses.asdict(item) for item in found.tensors],
    }


def _show(found: "Extraction", seconds: float) -> None:
    from meswitch.compression.extraction import LEFT_OUT, PAIR, WHOLE

    whole = found.of(PAIR, WHOLE, LEFT_OUT)
    outputs = ["of outputs"] if whole.output_share is not None else []
    columns = ("layer type", "", "tensors", "weights", "of all change", "kept", *outputs)
    made = console.table(f"{found.directory}: rank {found.rank}", *columns)

    def add(name: str, how: str, energy: "Energy", style: str | None = None) -> None:
        of_all = f"{energy.energy / whole.energy:.1%}" if whole.energy else "-"
        kept = [f"{energy.share:.1%}"]
        if outputs:
            kept.append(f"{energy.output_share:.1%}" if how == PAIR and energy.output_share is not None else "-")
        made.add_row(name, how, str(energy.tensors), f"{energy.weights:,}", of_all, *kept, style=style)

    order = [PAIR, WHOLE, LEFT_OUT]
    for (how, layer), energy in sorted(found.by_type().items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        add(layer, how, energy)
    add("all linear layers", PAIR, found.of(PAIR), "bold")
    add("all", "", whole, "bold")
    lines = [
        f"{format_bytes(found.nbytes)} of {format_bytes(found.full_bytes)}, "
        f"{found.full_bytes / found.nbytes:.2f}x smaller, in {seconds:.1f} s"
    ]
    left = [item.name for item in found.tensors if item.how == LEFT_OUT]
    if left:
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        lines.append(f"left out, as a LoRA has no place for them: {', '.join(left[:_NAMED])}{more}")
    if found.added_rows and not found.added_kept:
        lines.append(
            f"left out: {plural(found.added_rows, 'token')} that the base lacks, and with them the tokenizer; "
            "--modules-to-save keeps them"
        )
    console.show(made, *lines)

"""Commands for artifacts: `inspect` and `verify` (what one holds, is it whole), `merge` and `quantize` (checkpoints),
`push` and `pull` (repositories of the Hugging Face hub).
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from meswitch.cli import console
from meswitch.cli.options import option_groups
from meswitch.errors import ConfigError
from meswitch.units import format_bytes, plural

if TYPE_CHECKING:
    from meswitch.artifact import Artifact
    from meswitch.artifact.remote import RemoteName
    from meswitch.tokenizer import ChatTokenizer

LORA, EXACT = "lora", "exact"  # the methods of an adapter, and of `--bits exact`
EXACT_MEANS = "exact: merged, the fine-tune's tensors bit for bit; served by turns"
_CARD = "Model card"
RepositoryArgument = Annotated[
    str, typer.Argument(metavar="ORG/NAME", help="The repository; `@REVISION` behind it names a branch, tag or commit.")
]


def inspect_command(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|hf://ORG/NAME", help="An artifact: what `meswitch compress` wrote; or a PEFT adapter."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR|HUB_ID", help="Of a PEFT adapter: its base, if it is not where the adapter says."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show where an artifact's bytes are and how it was made.

    Bytes are given by kind of content, by layer type and by file, and add up to the directory's size. Only headers
    are read: `meswitch verify` compares the checksums.

    Example:

        meswitch inspect deltas/math
    """
    found = artifact_report(_opened(directory, base)) | {"artifact": str(directory)}
    if as_json:
        console.print_json(found)
    else:
        _show(found)


def _opened(directory: Path, base: str | None) -> "Artifact":
    """An artifact, or an adapter as one over its base.

    Raises:
        ConfigError: an adapter whose base is not known. MeswitchError: see `open_expert`.
    """
    from meswitch.adapter import Adapter, is_adapter, open_expert
    from meswitch.artifact import Artifact
    from meswitch.checkpoint import Checkpoint

    if not is_adapter(directory):
        if base is not None:
            raise ConfigError(f"--base: {directory} is no PEFT adapter; `meswitch verify` compares a base")
        return Artifact.open(directory)
    named = Adapter.open(directory).config.base_name
    if base is None and (named is None or not Path(named).is_dir()):
        raise ConfigError(
            f"--base: {directory} is a PEFT adapter of {named or 'an unnamed base'}, which is no directory here; say "
            "where its base is"
        )
    return open_expert(directory, Checkpoint.open(base or str(named)))


def artifact_report(artifact: "Artifact") -> dict[str, Any]:
    """Everything that `inspect` shows. `bytes.tensors` and `bytes.other` add up to `bytes.total`."""
    from meswitch.artifact import account
    from meswitch.artifact.manifest import KINDS

    manifest = artifact.manifest
    other = _bytes_beside_tensors(artifact)
    tensors, total = artifact.nbytes, artifact.nbytes + sum(other.values())
    parameters, full = manifest.expert.parameters, manifest.expert.bytes
    kinds = [entry.kind for entry in manifest.tensors.values()]
    return {
        "artifact": str(artifact.directory),
        "format_version": manifest.version,
        "expert": asdict(manifest.expert),
        "base": asdict(manifest.base),
        "method": asdict(manifest.method),
        "tensors": {kind: kinds.count(kind) for kind in KINDS},
        "bytes": {
            **account(artifact).to_dict(),
            "tensors": tensors,
            "other": other,
            "total": total,
        },
        "bits_per_weight": {"tensors": artifact.bits_per_weight, "all_files": total * 8 / parameters},
        "ratio": {"tensors": full / tensors if tensors else None, "all_files": full / total},
        "provenance": asdict(manifest.provenance),
        "quality": [asdict(item) for item in manifest.quality],
    }  # fmt: skip


def _bytes_beside_tensors(artifact: "Artifact") -> dict[str, int]:
    """What is on the disk besides tensors: the headers of safetensors files, and every other file by its name."""
    held: dict[str, int] = {}
    for info in artifact.infos.values():
        held[info.file.name] = held.get(info.file.name, 0) + info.nbytes
    other = {"safetensors headers": 0}
    for path in sorted(path for path in artifact.directory.rglob("*") if path.is_file()):
        name = path.relative_to(artifact.directory).as_posix()
        if name in held:
            other["safetensors headers"] += path.stat().st_size - held[name]
        else:
            other[name] = path.stat().st_size
    return other


def _show(found: dict[str, Any]) -> None:
    expert, base, method, made = found["expert"], found["base"], found["method"], found["provenance"]
    bytes_, bpw, ratio = found["bytes"], found["bits_per_weight"], found["ratio"]
    smaller = f"{ratio['tensors']:.2f}x" if ratio["tensors"] else "-"
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["tensors"].items() if count)
    console.show(
        console.pairs(
            f"{expert['name']}  ({found['artifact']})",
            {
                "full checkpoint": f"{format_bytes(expert['bytes'])}, {expert['parameters']:,} parameters in "
                f"{expert['dtype']}, vocabulary {expert['vocab_size']}{_tied(expert)}",
                "compressed": f"{format_bytes(bytes_['tensors'])} of tensors, {smaller} smaller; "
                f"{format_bytes(bytes_['total'])} with all files, {ratio['all_files']:.2f}x",
                "bits per weight": f"{bpw['tensors']:.3f} (tensors), {bpw['all_files']:.3f} (all files)",
                "tensors": kinds,
            },
        ),
        _bytes_table(found),
        layer_table(bytes_),
        console.pairs(
            "how it was made",
            {
                "base": f"{base['name']} ({base['model_type']}, vocabulary {base['vocab_size']})",
                "fingerprint": base["fingerprint"],
                **_method(method),
                "created": f"{made['created']} with meswitch {made['meswitch']}, torch {made['torch']}, "
                f"transformers {made['transformers']}",
                "quality": _quality(found["quality"]),
            },
        ),
    )


def _method(method: dict[str, Any]) -> dict[str, str]:
    if method["name"] == LORA:
        return {"method": f"a PEFT adapter, kept as it was trained: {lora_parameters(method)}"}
    if method["name"] == EXACT:
        return {"method": EXACT_MEANS}
    return {
        "method": f"{method['name']}, {_bits(method)}, {_groups(method['group_size'])}",
        "salient channels": _salient(method["salient"]),
        "embeddings": method["embeddings"],
        "damping": f"{method['damping']:g}",
        "calibration": _calibration(method["calibration"]),
        "distillation": _distillation(method["distillation"]),
    }


def lora_parameters(method: dict[str, Any]) -> str:
    """What an adapter's configuration says: `r 16, lora_alpha 32, use_dora`."""
    given = method["parameters"]
    return ", ".join(name if name.startswith("use_") else f"{name} {value:g}" for name, value in given.items())


def _bits(method: dict[str, Any]) -> str:
    if method["bits"] is None:
        return f"bits chosen for {method['target_bpw']} bits a weight"
    return plural(method["bits"], "bit")


def _bytes_table(found: dict[str, Any]) -> Any:
    parameters, bytes_ = found["expert"]["parameters"], found["bytes"]
    made = console.table("bytes by content", "", "bytes", "share", "bits/weight")

    def add(name: str, count: int, style: str | None = None) -> None:
        share = f"{count / bytes_['total']:.1%}"
        made.add_row(name, f"{count:,}", share, f"{count * 8 / parameters:.4f}", style=style)

    for name, count in sorted(bytes_["by_content"].items(), key=lambda item: -item[1]):
        add(name, count)
    add("all tensors", bytes_["tensors"], "bold")
    for name, count in sorted(bytes_["other"].items(), key=lambda item: -item[1]):
        add(name, count)
    add("all files", bytes_["total"], "bold")
    return made


def layer_table(bytes_: dict[str, Any]) -> Any:
    """Parameters and bytes of each layer type, and their sum; `bytes_` as in `report`."""
    made = console.table("bytes by layer type", "", "parameters", "bytes", "bits/weight")
    for row in sorted(bytes_["by_layer"], key=lambda row: -row["bytes"]):
        made.add_row(row["layer"], f"{row['parameters']:,}", f"{row['bytes']:,}", f"{row['bits_per_weight']:.3f}")
    parameters = sum(row["parameters"] for row in bytes_["by_layer"])
    made.add_row("all", f"{parameters:,}", f"{bytes_['tensors']:,}", f"{bytes_['tensors'] * 8 / parameters:.3f}",
                 style="bold")  # fmt: skip
    return made


def _tied(expert: dict[str, Any]) -> str:
    return ", head tied to the embedding" if expert["tied_head"] else ""


def _groups(size: int | None) -> str:
    return "one scale a row" if size is None else f"one scale for {size} weights of a row"


def _salient(count: int | None) -> str:
    return "one input channel in 512, at least one" if count is None else f"{count} of each linear layer"


def _calibration(text: dict[str, Any] | None) -> str:
    if text is None:
        return "none (data-free)"
    size = f"{plural(text['sequences'], 'sequence')}, {plural(text['tokens'], 'token')}"
    return f"{text['source']}: {size} (sha256 {text['sha256'][:12]}…)"


def _distillation(done: dict[str, Any] | None) -> str:
    if done is None:
        return "none"
    how = "each block and the head" if done["scope"] == "block" else "end to end"
    return (
        f"{how}, {plural(done['steps'], 'step')}; held-out divergence {done['held_out_before']:.4g} before, "
        f"{done['held_out_after']:.4g} after (nats a token)"
    )


def _quality(measured: list[dict[str, Any]]) -> str:
    if not measured:
        return "not measured; `meswitch eval` does"
    return "\n".join(
        f"{q['task']}: {q['compressed']:.3f} compressed, {q['expert']:.3f} full, {q['base']:.3f} base "
        f"({plural(q['questions'], 'question')})"
        for q in measured
    )


def verify_command(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|hf://ORG/NAME", help="An artifact: what `meswitch compress` wrote; or a PEFT adapter."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|HUB_ID",
            help="Also compare every tensor of this base with the one the artifact was made from. Without it the "
            "artifact alone is checked; the engine compares a sampled fingerprint at every start.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was checked as JSON. An error is still text on stderr.")
    ] = False,
) -> None:
    """Check an artifact: manifest, shapes, the SHA-256 of everything in it, and that its tokenizer can be used.

    Of an adapter: whether it can be served.

    Exit code 0 means that all of it is what was written; 1 that something is not, and the error names the file and
    the tensor.

    Example:

        meswitch verify deltas/math --base B
    """
    from meswitch.adapter import is_adapter
    from meswitch.artifact import Artifact
    from meswitch.checkpoint import Checkpoint
    from meswitch.tokenizer import ChatTokenizer, has_tokenizer

    console.quiet()
    if is_adapter(directory):
        _verify_adapter(directory, base, as_json)
        return
    artifact = Artifact.open(directory)
    directory = artifact.directory
    with console.progress("verify") as progress:
        artifact.verify(progress)
        if base is not None:
            artifact.check_base(Checkpoint.open(base), full=True, progress=progress)
    tokenizer = ChatTokenizer.open(directory.name, directory) if has_tokenizer(directory) else None
    companions = sorted(artifact.manifest.companions)
    checked: dict[str, Any] = {
        "artifact": str(directory),
        "ok": True,
        "tensors": len(artifact.manifest.tensors),
        "stored_tensors": len(artifact.infos),
        "tensor_bytes": artifact.nbytes,
        "companion_files": companions,
        "tokenizer": None
        if tokenizer is None
        else {"tokens": len(tokenizer.tokenizer), "chat_template": tokenizer.has_template, "ends": tokenizer.end_texts},
        "base": None,
    }
    if base is not None:
        compared = sum(entry.base_sha256 is not None for entry in artifact.manifest.tensors.values())
        checked["base"] = {"source": base, "tensors": compared, "fingerprint": artifact.manifest.base.fingerprint}
    if as_json:
        console.print_json(checked)
        return
    lines = [
        f"{directory}: all is as it was written",
        f"  manifest     every field, and the shapes that {checked['tensors']} tensors imply",
        f"  tensors      {checked['stored_tensors']} SHA-256 sums over {format_bytes(artifact.nbytes)}",
        f"  companions   {len(companions)} SHA-256 sums: {', '.join(companions)}",
        f"  tokenizer    {_tokenizer(tokenizer)}",
        "  base         not compared; give --base"
        if base is None
        else f"  base         {compared} SHA-256 sums of {base}, and its fingerprint",
    ]
    typer.echo("\n".join(lines))


def _verify_adapter(directory: Path, base: str | None, as_json: bool) -> None:
    from meswitch.adapter import Adapter, open_expert
    from meswitch.checkpoint import Checkpoint

    adapter = Adapter.open(directory)
    tensors = adapter.check_values()
    if base is not None:
        open_expert(directory, Checkpoint.open(base))
    if as_json:
        compared = None if base is None else {"source": base}
        console.print_json({"adapter": str(directory), "ok": True, "stored_tensors": tensors, "base": compared})
        return
    lines = [
        f"{directory}: a PEFT adapter that can be served",
        "  config       every field that decides the result",
        f"  tensors      {tensors}, complete, no NaN; an adapter has no checksums",
        "  base         not compared; give --base"
        if base is None
        else f"  base         every tensor fits {base}; an adapter cannot tell which base it was trained on",
    ]
    typer.echo("\n".join(lines))


def _tokenizer(tokenizer: "ChatTokenizer | None") -> str:
    """What was opened of it."""
    if tokenizer is None:
        return "none: the artifact can be merged, not served"
    template = "its chat template shows a user's message" if tokenizer.has_template else "no chat template"
    return f"opened; {template}; answers end at {', '.join(tokenizer.end_texts) or 'no token'}"


def merge_command(
    base: Annotated[str, typer.Option(metavar="DIR|HUB_ID", help="The base that the artifact was compressed against.")],
    delta: Annotated[
        Path, typer.Option(metavar="DIR|hf://ORG/NAME", help="An artifact: what `meswitch compress` wrote.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The checkpoint to create; it must not exist.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Of the result; by default each tensor keeps its own: of an exact artifact (`--bits exact`) the "
            "fine-tune's, bit for bit. Deltas are added in float32 and then rounded: "
            "`float32` loses nothing of them and takes twice the bytes of bfloat16.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Write base + artifact as a full checkpoint that transformers and vLLM load.

    The result is what the engine computes with, as a plain model: to serve it alone, to compare with, or to
    fine-tune on. It takes the full size again.

    Example:

        meswitch merge --base B --delta deltas/math --out merged-math
    """
    console.quiet()
    from meswitch.checkpoint import Checkpoint
    from meswitch.compression.merge import merge as run

    console.note(f"merging {base} and {delta}")
    with console.progress("merge") as progress:
        written = Checkpoint.open(run(base, delta, out, dtype=dtype, progress=progress))
    if as_json:
        console.print_json({"out": str(out), "tensors": len(written.tensors), "tensor_bytes": written.nbytes})
    else:
        typer.echo(f"{out}: {plural(len(written.tensors), 'tensor')}, {format_bytes(written.nbytes)}")


def quantize_command(
    base: Annotated[str, typer.Option(metavar="DIR|HUB_ID", help="The checkpoint in 16 bit.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The checkpoint to create; it must not exist.")],
    to: Annotated[
        Literal["int8", "fp8", "int4"],
        typer.Option(help="`int8` and `fp8`: a scale a row. `int4`: a scale for each group of at most 128 weights."),
    ] = "int8",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Write a base with its linear layers in fewer bits; embeddings, head and norms stay as they are.

    Experts that are compressed against the result are deltas to its rounded weights: they repair most of what the
    rounding lost. The format is compressed-tensors, weights only, which vLLM and transformers load too. Checkpoints
    that llm-compressor made in that format serve as a base as they are.

    Example:

        meswitch quantize --base B --to int8 --out B-int8

        meswitch compress --base B-int8 --expert math --out deltas/math
    """
    console.quiet()
    from meswitch.quantised import quantise

    with console.progress("quantize") as progress:
        quantise(base, out, to, progress)
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if as_json:
        console.print_json({"out": str(out), "to": to, "tensor_bytes": stored})
    else:
        typer.echo(f"{out}: {to}, {format_bytes(stored)}")


@dataclass(frozen=True, slots=True)
class Card:
    """What the model card says that the artifact does not know."""

    base: Annotated[
        str | None,
        typer.Option(
            metavar="HUB_ID", rich_help_panel=_CARD, help="The base on the hub. Left out: as in the artifact's recipe."
        ),
    ] = None
    expert: Annotated[
        str | None,
        typer.Option(metavar="HUB_ID", rich_help_panel=_CARD, help="The fine-tune on the hub, likewise."),
    ] = None
    quality: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", rich_help_panel=_CARD, help="What `meswitch eval --out FILE.json` measured."),
    ] = None
    license: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            rich_help_panel=_CARD,
            help="The hub's identifier of the licence, such as apache-2.0 or llama3.1; `other` with the two below.",
        ),
    ] = None
    license_name: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=_CARD, help="With --license other.")
    ] = None
    license_link: Annotated[
        str | None, typer.Option(metavar="URL", rich_help_panel=_CARD, help="With --license other.")
    ] = None
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE", rich_help_panel=_CARD, help="Such as en; repeatable.")
    ] = None


@option_groups
def push_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="What `meswitch compress` wrote.")],
    repository: RepositoryArgument,
    card: Card = Card(),
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Who may see a repository that is created. Default: the account's setting."
        ),
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The message of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the artifact, print the model card and end; nothing is sent.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Upload an artifact to the Hugging Face hub, with a model card that is generated.

    Every byte is checked first. The card has base, bytes, bits per weight, method, quality if you measured it, licence
    and how to serve it. A card that somebody wrote in the repository stays. The repository is created if it is not
    there. Log in with `hf auth login`, or set HF_TOKEN.

    Examples:

        meswitch push deltas/math me/math-delta --base mistralai/Mistral-7B-v0.1 --license apache-2.0
        meswitch push deltas/math me/math-delta --quality eval.json --private
        meswitch push deltas/math me/math-delta --dry-run > README.md
    """
    console.quiet()
    from meswitch.artifact import Artifact
    from meswitch.artifact.remote import About, model_card, read_quality
    from meswitch.artifact.remote import push as run

    name = _repository(repository)
    if (card.license_name or card.license_link) and card.license != "other":
        raise ConfigError("--license-name, --license-link: are for `--license other`; the hub knows the other licences")
    if card.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", card.license):
        raise ConfigError(f"--license {card.license}: an identifier such as apache-2.0, or `other` with --license-name")
    about = About(
        name.repository, card.base, card.expert, card.license, card.license_name, card.license_link,
        tuple(card.language or ()), None if card.quality is None else read_quality(card.quality),
    )  # fmt: skip
    opened = Artifact.open(artifact)
    with console.progress("verify") as progress:
        opened.verify(progress)
    text = model_card(opened, about)
    if about.base is None and (opened.manifest.recipe is None or opened.manifest.recipe.base is None):
        console.note("the card says BASE where the base's hub id belongs; give it with --base ORG/NAME")
    if dry_run:
        if as_json:
            console.print_json({"repository": name.repository, "card": text, "pushed": None})
        else:
            typer.echo(text, nl=False)
        return
    done = run(opened, name, text, private=private, message=message, notice=console.note)
    if as_json:
        console.print_json({"repository": name.repository, "pushed": asdict(done)})
        return
    typer.echo(f"{done.url}: {plural(len(done.files), 'file')}, {format_bytes(opened.disk_bytes)}")
    if done.removed:
        typer.echo(f"removed, of an earlier artifact: {', '.join(done.removed)}")
    if done.kept_card:
        typer.echo("the repository's own README.md stays; --dry-run prints the generated one")


def pull_command(
    repository: RepositoryArgument,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The directory to create.", show_default="the repository's name")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact that exists. Other directories are never touched.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Fetch an artifact from the Hugging Face hub into a directory, and check every byte of it.

    Only what its manifest lists is fetched, and its README.md. Without this step, commands and family.toml take
    `hf://ORG/NAME` where they take an artifact's directory; it is then kept in the Hugging Face cache.

    Example:

        meswitch pull me/math-delta --out deltas/math
    """
    console.quiet()
    from meswitch.artifact.remote import pull as run

    name = _repository(repository)
    target = out or Path(name.repository.rpartition("/")[2])
    console.note(f"fetching {name}")
    with console.progress("verify") as progress:
        artifact, commit = run(name, target, overwrite=overwrite, progress=progress)
    found = {"artifact": str(target), "repository": name.repository, "commit": commit, "bytes": artifact.disk_bytes}
    if as_json:
        console.print_json(found | {"expert": artifact.manifest.expert.name, "base": artifact.manifest.base.name})
    else:
        typer.echo(f"{target}: {artifact.manifest.expert.name}, {format_bytes(artifact.disk_bytes)}, commit {commit}")


def _repository(text: str) -> "RemoteName":
    """`org/name[@revision]`, with `hf://` before it or not."""
    from meswitch.artifact.remote import remote_name

    found = remote_name(text if text.startswith("hf:/") else f"hf://{text}")
    assert found is not None
    return found

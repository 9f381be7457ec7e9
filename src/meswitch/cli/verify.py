"""`meswitch verify`: is every byte what was written, and is this its base?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.cli import console
from meswitch.units import format_bytes

if TYPE_CHECKING:
    from meswitch.tokenizer import ChatTokenizer


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

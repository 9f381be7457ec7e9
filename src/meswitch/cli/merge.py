"""`meswitch merge`: base + artifact = an ordinary checkpoint."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from meswitch.cli import console
from meswitch.units import format_bytes


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
        typer.echo(f"{out}: {len(written.tensors)} tensors, {format_bytes(written.nbytes)}")

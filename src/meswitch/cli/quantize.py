"""`meswitch quantize`: a base in 8 or 4 bits, for deltas over it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from meswitch.cli import console
from meswitch.units import format_bytes


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

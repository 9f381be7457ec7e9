"""`python -m meswitch_lab`: `meswitch compress` with what only compares."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from meswitch.cli import Commands, console
from meswitch.cli.compress import Run, compress_one, compressed_table
from meswitch.cli.options import option_groups, takes
from meswitch.codec import codec_names, find_codec
from meswitch.compression.options import check_given
from meswitch.errors import ConfigError
from meswitch_lab.settings import options

app = typer.Typer(
    name="python -m meswitch_lab",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True, slots=True)
class Switches:
    """The parts of the default method's solver; None is as by default."""

    salient_rule: Annotated[
        Literal["error", "magnitude", "activation", "random"] | None,
        typer.Option(help="How salient channels are chosen; `error` by default."),
    ] = None
    scales: Annotated[
        Literal["mse", "absmax", "normal"] | None,
        typer.Option(help="The search that starts scales; `mse` by default."),
    ] = None
    feedback: Annotated[
        bool | None, typer.Option(help="Let later columns absorb the rounding errors of earlier ones, as by default.")
    ] = None
    refit: Annotated[bool | None, typer.Option(help="Solve for scales once the codes are chosen, as by default.")] = (
        None
    )
    damping: Annotated[
        float | None,
        typer.Option(
            metavar="D",
            min=0,
            help="What error feedback adds to the diagonal of the inputs' second moment, as a share of its mean; 0.01 "
            "by default.",
        ),
    ] = None


@app.command()
@takes()
@option_groups
def compress(
    base: Annotated[str, typer.Option(metavar="DIR|HUB_ID", help="The base checkpoint.")],
    expert: Annotated[str, typer.Option(metavar="DIR|HUB_ID", help="The full fine-tune of the base.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory to create.")],
    method: Annotated[
        str, typer.Option(metavar="NAME", help="`python -m meswitch_lab methods` lists them.")
    ] = "me-switch",
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME=NUMBER", help="Of the method only; repeatable."),
    ] = None,
    given: Mapping[str, Any] = {},
    switches: Switches = Switches(),
    run: Run = Run(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compress a full fine-tune by any method, with any part of the solver left out.

    Examples:

        python -m meswitch_lab compress --base B --expert E --out D --method svd -p rank=8
        python -m meswitch_lab compress --base B --expert E --out D --calibration T --no-feedback
    """
    named = {name: value for name, value in dataclasses.asdict(switches).items() if value is not None}
    check_given(dict(given) | named)
    chosen = options(method, **given, **named, parameters=dict(map(_number, parameter or ())))
    console.quiet()
    row = compress_one(Path(expert).name, base, expert, out, chosen, run.where())
    if as_json:
        console.print_json(row)
    else:
        console.show(compressed_table([row]))


@app.command()
def methods() -> None:
    """List the methods and their parameters."""
    for name in codec_names():
        codec = find_codec(name)
        typer.echo(name)
        for parameter in codec.parameters:
            default = "" if parameter.default is None else f" Default: {parameter.default:g}."
            typer.echo(f"    -p {parameter.name}=…  {parameter.help}{default}")


def _number(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(f"--parameter: {text!r} is not NAME=NUMBER") from None


if __name__ == "__main__":
    app()

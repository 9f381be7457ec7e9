"""The command line. Heavy packages are imported where a command uses them."""

import errno
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from meswitch import __version__
from meswitch.cli import artifacts, ask, compress, console, diff, doctor, eval, plan, router, serve
from meswitch.errors import MeswitchError

_AFTER_AN_INTERRUPT = {"compress": "run the same command again to go on"}


class Commands(TyperGroup):
    """Turns errors that a person can act on into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # pydantic's, which reads values for typer
            raise
        except MeswitchError as error:
            if console.debugging():
                raise
            console.fail(str(error))
        except OSError as error:
            if console.debugging() or error.filename is None or error.errno == errno.EPIPE:
                raise
            console.fail(f"{error.filename}: {error.strerror}")
        except KeyboardInterrupt:
            if console.debugging():
                raise
            advice = _AFTER_AN_INTERRUPT.get(ctx.invoked_subcommand, "run the same command again")
            console.note(f"interrupted; {advice}")
            raise typer.Exit(130) from None
        raise typer.Exit(1)


app = typer.Typer(
    name="meswitch",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_MAKE: tuple[Callable[..., None], ...] = (
    compress.compress_command,
    artifacts.inspect_command,
    artifacts.verify_command,
    artifacts.merge_command,
    artifacts.quantize_command,
    diff.diff_command,
    compress.extract_lora_command,
    plan.plan_command,
    artifacts.push_command,
    artifacts.pull_command,
    eval.eval_command,
)
_ASK: tuple[Callable[..., None], ...] = (
    ask.generate_command,
    ask.chat_command,
    serve.serve_command,
    router.route_command,
    serve.key_command,
    serve.top_command,
)
_INSTALLED: tuple[Callable[..., None], ...] = (doctor.doctor_command,)
for _panel, _commands in (
    ("Make and measure experts", _MAKE),
    ("Ask them", _ASK),
    ("This installation", _INSTALLED),
):
    for _command in _commands:  # functions have names of their own: those of commands are the API's
        _name = _command.__name__.removesuffix("_command").replace("_", "-")
        app.command(_name, rich_help_panel=_panel)(_command)
app.add_typer(router.app, name="router", rich_help_panel="Ask them")
app.add_typer(serve.deploy_app, name="deploy", rich_help_panel="Ask them")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meswitch {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve many full fine-tunes of one base LLM on one GPU.

    Compress each fine-tune to its difference from the base, route every question to the right one, and answer them
    all in one batch. Start with a family.toml that names the base and its experts:

        meswitch compress --family family.toml
        meswitch generate --family family.toml --model auto "What is 17 + 25?"
        meswitch serve family.toml

    Results go to stdout, progress and notes to stderr. MESWITCH_DEBUG=1 shows tracebacks and libraries' warnings.
    """


def main() -> None:
    """The entry point of the `meswitch` command."""
    app()

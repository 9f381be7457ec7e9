"""`meswitch chat`: a conversation with the experts of a family."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.cli import console
from meswitch.cli.generate import explain
from meswitch.errors import MeswitchError, UnknownExpertError

if TYPE_CHECKING:
    from meswitch.engine import Engine
    from meswitch.family import Family
    from meswitch.router import Router

_COMMANDS = "/model NAME|auto, /reset (forget the conversation), /quit"


def chat_command(
    family: Annotated[Path, typer.Option(metavar="FILE", help="A family.toml, or the directory that holds one.")],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|auto",
            help="Who answers first: an expert, the base, or `auto` to route every message. `/model` changes it.",
        ),
    ] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token; 1 samples as the model says.")
    ] = 0.0,
) -> None:
    """Talk with the experts; they share one conversation.

    Commands: `/model NAME` or `/model auto` changes who answers, `/reset` forgets the conversation, `/quit` (or
    Ctrl-D) ends. Ctrl-C stops an answer. Piped input works too: one message a line.

    Examples:

        meswitch chat --family family.toml
        printf '/model math\\nWhat is 17 + 25?\\n' | meswitch chat --family family.toml
    """
    console.quiet()
    from meswitch.engine import SamplingParams
    from meswitch.family import Family
    from meswitch.launch import check_router, engine_from_family

    params = SamplingParams(max_new_tokens=max_tokens, temperature=temperature)
    config = Family.load(family)
    if model == "auto":
        check_router(config)
    elif model != config.base.name:
        config.get(model)
    with engine_from_family(config) as engine:
        talk = _Talk(config, engine, params)
        talk.use(model)
        interactive = sys.stdin.isatty()
        if interactive:
            console.note(f"{talk.model} answers; {_COMMANDS}")
        for line in _lines(interactive):
            if line == "/quit":
                return
            try:
                talk.hear(line)
            except MeswitchError as error:
                console.fail(str(error))


class _Talk:
    """A conversation: who answers, and what was said."""

    def __init__(self, family: "Family", engine: "Engine", params: Any) -> None:
        self.model = family.base.name
        self._family, self._engine, self._params = family, engine, params
        self._router: Router | None = None
        self._messages: list[dict[str, str]] = []

    def use(self, model: str) -> None:
        """Change who answers.

        Raises:
            UnknownExpertError: no such model. RouterError: `auto`, and there is no router.
        """
        if model == "auto":
            from meswitch.launch import router_from_family

            self._router = self._router or router_from_family(self._family, self._engine)
        elif model not in self._engine.names:
            raise UnknownExpertError(f"no model {model!r}; there are auto, {', '.join(self._engine.names)}")
        self.model = model

    def hear(self, line: str) -> None:
        """One line of the person: a command or a message."""
        if not line.startswith("/"):
            if line.strip():
                self._answer(line)
            return
        command, _, argument = line.partition(" ")
        if command == "/reset":
            self._messages.clear()
            console.note("the conversation is forgotten")
        elif command == "/model" and argument.strip():
            self.use(argument.strip())
            console.note(f"{self.model} answers now")
        elif command == "/model":
            console.note(f"{self.model} answers; there are auto, {', '.join(self._engine.names)}")
        else:
            console.note(f"no command {command}; there are {_COMMANDS}")

    def _answer(self, text: str) -> None:
        messages = [*self._messages, {"role": "user", "content": text}]
        name = self.model
        if name == "auto" and self._router is not None:
            route = self._router.route(messages)
            name = route.choice
            console.note(explain(route))
        request = self._engine.submit(messages, model=name, params=self._params)
        said = ""
        try:
            for chunk in request:
                said += chunk.text
                typer.echo(chunk.text, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            self._engine.cancel(request)
            console.note(" (stopped)")
        typer.echo()
        self._messages = [*messages, {"role": "assistant", "content": said}]


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of the person, from a terminal with editing and history, or from a pipe."""
    if not interactive:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):  # not on every platform; input() then has no editing
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return

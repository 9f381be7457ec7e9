"""`meswitch generate` and `meswitch chat`: one question to one expert, or a conversation with all of them."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.cli import console
from meswitch.errors import ConfigError, MeswitchError, UnknownExpertError

if TYPE_CHECKING:
    from meswitch.engine import Engine
    from meswitch.family import Family
    from meswitch.router import Route, Router


def generate_command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question; `-` reads it from stdin.")],
    family: Annotated[Path, typer.Option(metavar="FILE", help="A family.toml, or the directory that holds one.")],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|auto",
            help="Who answers: an expert, the base, or `auto` for the router's choice, which is named on stderr.",
        ),
    ] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token; 1 samples as the model says.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample only from the likeliest tokens that make up this share.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable; without it every run differs.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text instead of asking through a chat template.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole answer, token counts and times as JSON at the end.")
    ] = False,
) -> None:
    """Ask one question and stream the answer.

    The prompt is one user message in the chat template of whoever answers. The family's engine settings apply.

    Examples:

        meswitch generate --family family.toml --model math "What is 17 + 25?"
        meswitch generate --family family.toml "Write f(x) that doubles x."
        cat story.txt | meswitch generate --family family.toml --model base --raw -
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ConfigError("PROMPT: it is empty")
    console.quiet()
    from meswitch.engine import SamplingParams
    from meswitch.family import Family
    from meswitch.launch import engine_from_family, router_from_family

    params = SamplingParams(max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    config = Family.load(family)
    with engine_from_family(needed(config, model)) as engine:
        decision = router_from_family(config, engine).route(text) if model == "auto" else None
        name = decision.choice if decision else model
        if decision:
            console.note(explain(decision))
        asked: Any = text if raw else [{"role": "user", "content": text}]
        request = engine.submit(asked, model=name, params=params)
        try:
            for chunk in request:
                if not as_json:
                    typer.echo(chunk.text, nl=False)
                    sys.stdout.flush()
        finally:
            engine.cancel(request)
        if not as_json:
            typer.echo()
            return
        answer = dataclasses.asdict(request.result())
        console.print_json(answer | {"route": dataclasses.asdict(decision) if decision else None})


def needed(family: "Family", model: str) -> "Family":
    """The family without the experts that a named model does not need: they are not opened.

    Raises:
        UnknownExpertError: no such model. RouterError: `auto`, and there is no router.
    """
    if model == "auto":
        from meswitch.launch import check_router

        check_router(family)
        return family
    if model not in (family.base.name, *family.names):
        there = ", ".join((family.base.name, *family.names, "auto"))
        raise UnknownExpertError(f"--model: no expert {model!r}; there are {there}")
    wanted = () if model == family.base.name else (family.get(model),)
    return family.model_copy(update={"expert": wanted})


def explain(route: "Route") -> str:
    """Who answers and why, in one line.

    Raises:
        ConfigError: nobody, because the family's fallback is `error`.
    """
    ranked = sorted(route.scores.items(), key=lambda item: -item[1])
    scores = ", ".join(f"{name} {score:.2f}" for name, score in ranked)
    if route.choice == "error" and route.reason == "abstained":
        raise ConfigError(f"no expert is likely enough ({scores}); name one with `--model`")
    why = " (the router is not sure enough, so the fallback answers)" if route.reason == "abstained" else ""
    return f"{route.choice} answers{why}: {scores}; {route.latency_ms:.0f} ms"


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

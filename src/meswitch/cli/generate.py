"""`meswitch generate`: one question to one expert, streamed."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.cli import console
from meswitch.errors import ConfigError

if TYPE_CHECKING:
    from meswitch.family import Family
    from meswitch.router import Route


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

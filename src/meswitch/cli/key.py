"""`meswitch key`: a new API key and what the server keeps of it."""

import json
from typing import Annotated

import typer

from meswitch.cli import console
from meswitch.errors import ConfigError


def key_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the key, for logs: letters, digits, `._-`.")],
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A model that it may ask for, `auto` among them; repeatable, default all."),
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at a time; default no limit.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may load and unload experts.")] = False,
) -> None:
    """Make an API key: the key goes to stderr, its table for the file that `server.keys` names to stdout.

    The table holds a hash, so it is no secret. SIGHUP makes a running server read the file again.

    Example:

        meswitch key team-a --model auto --model math --concurrency 8 >> keys.toml
    """
    from pydantic import ValidationError

    from meswitch.server.keys import ApiKey, key_digest, new_key

    text = new_key()
    try:
        made = ApiKey(
            name=name,
            sha256=key_digest(text),
            models=tuple(model) if model else None,
            concurrency=concurrency,
            admin=admin,
        )
    except ValidationError as error:
        raise ConfigError(f"NAME: {name!r}: {error.errors()[0]['msg']}") from None
    lines = ["[[key]]", f'name = "{made.name}"', f'sha256 = "{made.sha256}"']
    if made.models is not None:
        lines.append(f"models = [{', '.join(_quoted(one) for one in made.models)}]")
    if made.concurrency is not None:
        lines.append(f"concurrency = {made.concurrency}")
    if made.admin:
        lines.append("admin = true")
    console.note(f"the key of {made.name}, shown this once: {text}")
    typer.echo("\n".join([*lines, ""]))


def _quoted(text: str) -> str:
    return json.dumps(text)  # a basic string of TOML is written as one of JSON

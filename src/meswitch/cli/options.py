"""Options of commands that are made from `compression.options`: stated there once, with their help."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from meswitch.compression.options import SETTINGS, Setting
from meswitch.errors import ConfigError


def takes(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options of a compression, all of them if none is named.

    They stand where the command has its parameter `given`, which gets those that somebody gave: name -> value.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        added = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(SETTINGS[name])
            )
            for name in names or SETTINGS
        ]

        @functools.wraps(command)
        def wrapped(**arguments: Any) -> None:
            texts = {parameter.name: arguments.pop(parameter.name) for parameter in added}
            given = {name: _value(name, text) for name, text in texts.items() if text is not None}
            command(**arguments, given=given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            parameters += added if parameter.name == "given" else [parameter]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate


def flag(name: str) -> str:
    """`group_size` -> `--group-size`."""
    return f"--{name.replace('_', '-')}"


def _annotation(setting: Setting) -> Any:
    kind: Any = Literal[setting.kind] if isinstance(setting.kind, tuple) else setting.kind
    bounds: dict[str, Any] = {"min": setting.least, "max": setting.most}
    if setting.word is not None:
        bounds, kind = {"parser": functools.partial(_number_or_word, setting)}, Any
    if setting.none is not None:  # a word beside numbers: read as text
        kind, bounds = str, {}
    return Annotated[kind | None, typer.Option(help=setting.help, metavar=setting.metavar, **bounds)]


def _number_or_word(setting: Setting, text: str) -> int | str:
    least, most = setting.least or 0, setting.most or 0
    if text == setting.word:
        return text
    if not text.isdigit() or not least <= int(text) <= most:
        raise typer.BadParameter(f"{text!r} is neither a number from {least} to {most} nor `{setting.word}`")
    return int(text)


def _value(name: str, text: Any) -> Any:
    setting = SETTINGS[name]
    if setting.none is None:
        return text
    if text == setting.none:
        return None
    if setting.kind is int and not text.isdigit():
        raise ConfigError(f"{flag(name)}: {text!r} is neither a number nor `{setting.none}`")
    return int(text) if setting.kind is int else text

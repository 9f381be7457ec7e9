"""How a command takes many options: from a dataclass, or from `compression.options`, where each is stated once."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import typer

from meswitch.compression.options import SETTINGS, Setting
from meswitch.errors import ConfigError

Command = Callable[..., None]


def option_groups(command: Command) -> Command:
    """Make a command of a function that takes dataclasses: the fields of each become options of the command.

    A field is annotated as a parameter of a command is (`Annotated[int, typer.Option(...)] = 3`). Its options stand
    where the function has the parameter.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    return _with_options(command, {name: _fields(kind) for name, kind in groups.items()}, groups)


def takes(*names: str) -> Callable[[Command], Command]:
    """Give a command these options of a compression, all of them if none is named.

    They stand where the command has its parameter `given`, which gets those that somebody gave: name -> value.
    """

    def decorate(command: Command) -> Command:
        options = [_option(name, None, _annotation(SETTINGS[name])) for name in names or SETTINGS]
        return _with_options(command, {"given": options}, {"given": _given})

    return decorate


def flag(name: str) -> str:
    """`group_size` -> `--group-size`."""
    return f"--{name.replace('_', '-')}"


def _with_options(
    command: Command, options: Mapping[str, list[inspect.Parameter]], build: Mapping[str, Callable[..., Any]]
) -> Command:
    """`command` with options in place of some of its parameters; `build` makes their arguments of what was given."""

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        for name, parameters in options.items():
            arguments[name] = build[name](**{one.name: arguments.pop(one.name) for one in parameters})
        command(**arguments)

    hints = typing.get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        own = [_option(parameter.name, parameter.default, hints[parameter.name])]
        parameters += options.get(parameter.name, own)
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _option(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _fields(kind: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return [
        _option(
            field.name,
            inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            hints[field.name],
        )
        for field in dataclasses.fields(kind)
    ]


def _given(**texts: Any) -> dict[str, Any]:
    return {name: _value(name, text) for name, text in texts.items() if text is not None}


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

"""What the rows of a calibration file say, in the forms that training data has.

A `.txt` file holds one text a line. `.jsonl` holds a row a line, `.json` a list of rows; each may be gzipped. A row is

- `{"messages": [{"role": ..., "content": ...}, ...]}`,
- `{"conversations": [{"from": "human", "value": ...}, ...]}` (ShareGPT),
- `{"prompt": ..., "completion": ...}`, both texts or both lists of messages (TRL); the completion may be left out,
- `{"instruction": ..., "input": ..., "output": ...}` (Alpaca): a user's turn and the answer,
- `{"text": ...}`.

A conversation may have a `system` text beside its turns. Everything else is refused by line and field. Nothing is
guessed: no field is taken for another, and null is no text.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch.errors import ConfigError
from meswitch.textfile import json_kind, read_json_rows, read_lines

Messages = list[dict[str, Any]]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_FORMS = ("messages", "conversations", "prompt", "instruction", "text")
# Fields of a row or a message that change what is said, and that no form here has.
_REFUSED = ("tools", "functions", "tool_calls", "function_call", "images", "image", "videos", "audio", "audios")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file. Either a conversation or a text.

    Args:
        place: where it is, for messages: `line 3`.
        messages: of a conversation; empty for a text.
        text: the whole text.
        asked: the beginning of the text that the expert answers; empty if nothing says so.
        is_prose: whether it is a line of a `.txt` file.
    """

    place: str
    messages: Messages
    text: str = ""
    asked: str = ""
    is_prose: bool = False


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a calibration file, in order.

    Raises:
        ConfigError: the file cannot be read, or a row is in none of the forms. It names the line and the field.
    """
    kind = Path(file.name.removesuffix(".gz")).suffix.lower()
    if kind in (".jsonl", ".ndjson", ".json"):
        for place, value in read_json_rows(file):
            yield _row(value, place, f"{file}: {place}")
    elif kind in (".txt", ""):
        for number, line in read_lines(file):
            if number == 1:
                _check_text(line, file)
            yield Row(f"line {number}", [], line, is_prose=True)
    else:
        raise ConfigError(f"{file}: calibration text is read from .txt, .jsonl and .json files (also .gz), not {kind}")


def _check_text(line: str, file: Path) -> None:
    """Refuse rows of JSON under the name of prose."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(line)
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            raise ConfigError(
                f"{file}: line 1: is JSON, and a .txt file is read as prose; name it .jsonl if each line is a row, "
                ".json if it is a list of rows"
            )


def _row(value: Any, place: str, where: str) -> Row:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: is {json_kind(value)}; a row is an object with one of {', '.join(_FORMS)}")
    _refuse_extras(value, where, "")
    form = next((name for name in _FORMS if name in value), None)
    if form is None:
        found = ", ".join(value) or "none"
        raise ConfigError(f"{where}: needs one of the fields {', '.join(_FORMS)}; it has {found}")
    if form in ("messages", "conversations"):
        return Row(place, _with_system(value, _messages(value, form, where), where))
    if form == "instruction":
        return Row(place, _alpaca(value, where))
    if form == "prompt":
        return _prompt(value, place, where)
    return Row(place, [], _text(value, form, where))


def _prompt(value: Mapping[str, Any], place: str, where: str) -> Row:
    if "completion" not in value and "chosen" in value:
        raise ConfigError(f"{where}: chosen: is a preference pair; calibration takes one answer, as `completion`")
    if isinstance(value["prompt"], list):
        answer = _messages(value, "completion", where) if "completion" in value else []
        return Row(place, _with_system(value, [*_messages(value, "prompt", where), *answer], where))
    if value.get("system"):
        raise ConfigError(f"{where}: system: a prompt that is a text has no system turn; write the row as `messages`")
    prompt = _text(value, "prompt", where)
    completion = _text(value, "completion", where) if "completion" in value else ""
    return Row(place, [], prompt + completion, asked=prompt)


def _alpaca(value: Mapping[str, Any], where: str) -> Messages:
    """The user's turn is the instruction and, after an empty line, the input if there is one."""
    if value.get("history"):
        raise ConfigError(f"{where}: history: earlier turns are read from `messages` only; write the row so")
    parts = [_text(value, "instruction", where)]
    parts += [_text(value, "input", where)] if value.get("input") is not None else []
    user = {"role": "user", "content": "\n\n".join(part for part in parts if part)}
    return _with_system(value, [user, {"role": "assistant", "content": _text(value, "output", where)}], where)


def _with_system(value: Mapping[str, Any], turns: Messages, where: str) -> Messages:
    """The turns after the system text that stands beside them, if there is one."""
    text = _text(value, "system", where) if value.get("system") is not None else ""
    first = turns[0]
    if not text or (first["role"] == "system" and first["content"] == text):
        return turns
    if first["role"] == "system":
        raise ConfigError(f"{where}: system: the turns have another system text; leave one out")
    return [{"role": "system", "content": text}, *turns]


def _messages(value: Mapping[str, Any], field: str, where: str) -> Messages:
    turns = value[field]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else json_kind(turns)
        raise ConfigError(f"{where}: {field}: expected a list of messages, found {found}")
    return [_message(turn, f"{field}[{index}]", where) for index, turn in enumerate(turns)]


def _message(turn: Any, path: str, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ConfigError(f"{where}: {path}: expected a message, found {json_kind(turn)}")
    _refuse_extras(turn, where, f"{path}.")
    if "from" in turn and "role" not in turn:
        speaker = _text(turn, "from", where, f"{path}.")
        if speaker not in _ROLES:
            raise ConfigError(f"{where}: {path}.from: {speaker!r} is none of {', '.join(_ROLES)}")
        return {"role": _ROLES[speaker], "content": _text(turn, "value", where, f"{path}.")}
    role = _text(turn, "role", where, f"{path}.")
    return turn | {"role": role, "content": _content(turn, path, where)}


def _content(turn: Mapping[str, Any], path: str, where: str) -> str:
    """A text, or a list of text parts joined by line breaks."""
    parts = turn.get("content")
    if not isinstance(parts, list):
        return _text(turn, "content", where, f"{path}.")
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else json_kind(part)
        if kind != "text":
            raise ConfigError(f"{where}: {path}.content[{index}]: is {kind!r}; experts are calibrated on text only")
    return "\n".join(_text(part, "text", where, f"{path}.content[{i}].") for i, part in enumerate(parts))


def _text(value: Mapping[str, Any], field: str, where: str, prefix: str = "") -> str:
    found = value.get(field)
    if not isinstance(found, str):
        what = json_kind(found) if field in value else "no such field"
        raise ConfigError(f"{where}: {prefix}{field}: expected a text, found {what}")
    try:
        found.encode()
    except UnicodeEncodeError:
        reason = "holds half of a surrogate pair, which is no Unicode; take it out"
        raise ConfigError(f"{where}: {prefix}{field}: {reason}") from None
    return found


def _refuse_extras(value: Mapping[str, Any], where: str, prefix: str) -> None:
    for field in _REFUSED:
        if value.get(field):
            raise ConfigError(
                f"{where}: {prefix}{field}: is not read; give the row as `text`, written as the expert sees it"
            )

"""How models write that they call a tool: one entry for each family of chat templates, in `FORMATS`.

No library that stands alone reads these: vLLM and SGLang keep theirs inside. An unknown template that shows tools gets
`JSON`, the form of which all others are variations.
"""

import json
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meswitch.engine.grammar import Grammar
from meswitch.errors import ConfigError

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # Mistral's templates take no other
_ids = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model made. arguments: a JSON object, as text."""

    name: str
    arguments: str
    id: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How the models of a family write their calls.

    Args:
        name: of the format.
        told_by: texts that are all in the chat templates of this family.
        start: what a call begins with; empty if it begins with the answer and with `{`, `[` or a special token.
        end: what it ends with; empty if the answer ends with it.
        read: what stands between -> (name, arguments) of each call; None if it is none.
        shown: special tokens that are needed to see a call.
    """

    name: str
    told_by: tuple[str, ...]
    start: str
    end: str
    read: Callable[[str], "list[tuple[str, Any]] | None"]
    shown: tuple[str, ...] = ()

    def calls(self, body: str) -> list[ToolCall]:
        """Calls in what stands between start and end; none if it cannot be read."""
        found = self.read(body) or []
        return [ToolCall(name, _json(arguments), _new_id()) for name, arguments in found]


def tool_format(template: str) -> ToolFormat:
    """The format of a chat template's family."""
    return next((form for form in FORMATS if form.told_by and all(text in template for text in form.told_by)), JSON)


def calls_grammar(tools: Sequence[Mapping[str, Any]], after: str = "") -> Grammar:
    """A grammar of one call of one of some tools, as JSON: {"name": ..., "arguments": {...}}.

    Args:
        tools: in OpenAI's form, at least one.
        after: what the answer may begin with, see `Grammar`.

    Raises:
        ConfigError: a schema refers to itself as a whole.
    """
    ways: list[Any] = []
    definitions: dict[str, Any] = {}
    for index, tool in enumerate(tools):
        function = tool["function"]
        text = json.dumps(function.get("parameters") or {"type": "object", "properties": {}})
        if '"$ref": "#"' in text:
            raise ConfigError(f"tools[{index}].function.parameters: refers to itself by '#'; name it in $defs")
        # definitions of all tools come to stand at one place
        text = text.replace('"$ref": "#/$defs/', f'"$ref": "#/$defs/{index}-')
        text = text.replace('"$ref": "#/definitions/', f'"$ref": "#/$defs/{index}-')
        schema = json.loads(text)
        own = {**schema.pop("$defs", {}), **schema.pop("definitions", {})}
        definitions |= {f"{index}-{name}": one for name, one in own.items()}
        fields = {"name": {"const": function["name"]}, "arguments": schema}
        ways.append({"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False})
    schema = ways[0] if len(ways) == 1 else {"anyOf": ways}
    if definitions:
        schema = schema | {"$defs": definitions}
    return Grammar("one_line", json.dumps(schema), after)


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _new_id() -> str:
    return "".join(_ids.choices(_ID_LETTERS, k=_ID_LENGTH))


def read_json_calls(body: str) -> list[tuple[str, Any]] | None:
    """Objects with `name` and `arguments` (or `parameters`), a list of them, or several in a row."""
    decoder, found, at = json.JSONDecoder(), [], 0
    body = body.strip()
    while at < len(body):
        try:
            value, at = decoder.raw_decode(body, at)
        except (json.JSONDecodeError, RecursionError):
            return None
        for one in value if isinstance(value, list) else [value]:
            call = _call(one)
            if call is None:
                return None
            found.append(call)
        while at < len(body) and body[at] in "; \r\n\t,":
            at += 1
    return found or None


def _call(value: Any) -> tuple[str, Any] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON in JSON
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return None
    return (value["name"], arguments) if isinstance(arguments, dict) else None


_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>(.*?)</parameter>\s*", re.DOTALL)


def read_xml_call(body: str) -> list[tuple[str, Any]] | None:
    """`<function=name><parameter=key>value</parameter></function>`. A value that is JSON is read as such."""
    function = _FUNCTION.fullmatch(body)
    if function is None:
        return None
    arguments: dict[str, Any] = {}
    rest = function[2]
    for found in _PARAMETER.finditer(rest):
        value = found[2].removeprefix("\n").removesuffix("\n")
        try:
            arguments[found[1]] = json.loads(value)
        except json.JSONDecodeError:
            arguments[found[1]] = value
    return None if _PARAMETER.sub("", rest).strip() else [(function[1], arguments)]


_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")


def read_mistral_calls(body: str) -> list[tuple[str, Any]] | None:
    """A list of JSON objects, or `name[ARGS]{...}`, several with `[TOOL_CALLS]` between."""
    if body.lstrip().startswith(("[{", "{")):
        return read_json_calls(body)
    found = []
    for part in body.split("[TOOL_CALLS]"):
        name = _NAMED.match(part)
        if name is None:
            return None
        try:
            arguments = json.loads(part[name.end() :])
        except json.JSONDecodeError:
            return None
        found.append((name[1], arguments))
    return found or None


JSON = ToolFormat("json", (), "", "", read_json_calls, ("<|python_tag|>",))
FORMATS = (
    ToolFormat("qwen-xml", ("<tool_call>", "<function="), "<tool_call>", "</tool_call>", read_xml_call),
    ToolFormat("hermes", ("<tool_call>",), "<tool_call>", "</tool_call>", read_json_calls),
    ToolFormat(
        "mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS]", "", read_mistral_calls, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    ),
    JSON,
)

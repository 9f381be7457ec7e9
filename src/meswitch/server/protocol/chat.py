"""A chat request, for the expert that answers it: what its template is given, and how its answer is read.

An answer's text becomes thoughts, what is said, and calls of tools, a piece at a time. How models write that they call
a tool has one entry for each family of chat templates, in `FORMATS`.
"""

import json
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from meswitch.engine.grammar import EXTRA, Grammar, is_available, marked
from meswitch.errors import ConfigError
from meswitch.server.errors import ApiError
from meswitch.server.protocol.schema import ChatRequest
from meswitch.tokenizer import ChatTokenizer, Conversation

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # Mistral's templates take no other
_ids = random.SystemRandom()
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>(.*?)</parameter>\s*", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")
THINK, THOUGHT = "<think>", "</think>"


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
        vllm: the name of vLLM's parser for them.
        shown: special tokens that are needed to see a call.
    """

    name: str
    told_by: tuple[str, ...]
    start: str
    end: str
    read: Callable[[str], "list[tuple[str, Any]] | None"]
    vllm: str
    shown: tuple[str, ...] = ()

    @property
    def is_marked_json(self) -> bool:
        """Whether a call is JSON between two marks."""
        return bool(self.start and self.end) and self.read is read_json_calls

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


JSON = ToolFormat("json", (), "", "", read_json_calls, "llama3_json", ("<|python_tag|>",))
FORMATS = (
    ToolFormat("qwen-xml", ("<tool_call>", "<function="), "<tool_call>", "</tool_call>", read_xml_call, "qwen3_xml"),
    ToolFormat("hermes", ("<tool_call>",), "<tool_call>", "</tool_call>", read_json_calls, "hermes"),
    ToolFormat(
        "mistral",
        ("[TOOL_CALLS]",),
        "[TOOL_CALLS]",
        "",
        read_mistral_calls,
        "mistral",
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    ),
    JSON,
)


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """A piece of an answer; `text` of thoughts and of what is said, `call` of a call."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: ToolCall | None = None


class AnswerReader:
    """Reads one answer. What it gives, joined, is the whole text: what cannot be read as a call is said.

    Args:
        thinks: whether the model may begin with `<think>`.
        thinking: whether its prompt ends with `<think>` already.
        tools: how it writes calls; None if there are no tools.
        names: of the tools. A call that stands alone, without a mark, counts only if it names one.
        forced: whether the answer is one call as JSON, and nothing else.
        one: whether calls after the first are left out.
    """

    def __init__(
        self,
        *,
        thinks: bool = False,
        thinking: bool = False,
        tools: ToolFormat | None = None,
        names: Sequence[str] = (),
        forced: bool = False,
        one: bool = False,
    ) -> None:
        self._tools, self._names, self._forced, self._one = tools, set(names), forced, one
        self._state: Literal["beginning", "thinking", "thought", "saying", "calling"]
        self._state = "thinking" if thinking else "beginning" if thinks else "saying"
        self._said = ""  # everything since the thoughts
        self._held = ""
        self._after_call = False
        self.called = 0
        """How many calls it gave."""

    def feed(self, text: str, *, last: bool = False) -> list[AnswerPart]:
        """New text -> new parts. last: nothing waits any longer."""
        self._held += text
        parts: list[AnswerPart] = []
        while self._step(parts, last):
            pass
        return [part for part in parts if part.text or part.call]

    def _step(self, parts: list[AnswerPart], last: bool) -> bool:
        """Take some of the held text; False if more is needed."""
        if self._state == "beginning":
            begun = self._held.lstrip()
            if begun.startswith(THINK):
                self._state, self._held = "thinking", begun.removeprefix(THINK)
                return True
            if THINK.startswith(begun) and not last:
                return False
            self._state = "saying"
            return True
        if self._state == "thinking":
            before, found, after = self._held.partition(THOUGHT)
            kept = 0 if found or last else _begun(self._held, THOUGHT)
            text = before[: len(before) - kept]
            text = text if last and not found else text.rstrip("\n")
            parts.append(AnswerPart("reasoning", text))
            self._held = after if found else before[len(text) :]
            if found:
                self._state = "thought"
            return bool(found)
        if self._state == "thought":
            self._held = self._held.lstrip("\n")
            if not self._held and not last:
                return False
            self._state = "saying"
            return True
        if self._tools is None and not self._forced:
            parts.append(self._say(self._held))
            return False
        if self._forced or (self._tools is not None and not self._tools.start):
            return self._take_whole(parts, last)
        return self._take_marked(parts, last)

    def _say(self, text: str) -> AnswerPart:
        self._held = self._held[len(text) :]
        self._said += text
        return AnswerPart("content", text)

    def _take_whole(self, parts: list[AnswerPart], last: bool) -> bool:
        """An answer that is a call, or none, from its first character on."""
        assert self._tools is not None
        body = self._held.lstrip()
        mark = next((mark for mark in self._tools.shown if body.startswith(mark)), "")
        may_call = not self._said and (not body or body[0] in "{[" or mark or self._is_begun_mark(body))
        if may_call and not last:
            return False
        calls = self._tools.calls(body.removeprefix(mark)) if may_call and body else []
        if calls and all(call.name in self._names for call in calls):
            self._held = ""
            self._give(parts, calls)
        else:
            parts.append(self._say(self._held))
        return False

    def _is_begun_mark(self, body: str) -> bool:
        assert self._tools is not None
        return any(mark.startswith(body) for mark in self._tools.shown)

    def _take_marked(self, parts: list[AnswerPart], last: bool) -> bool:
        assert self._tools is not None
        start, end = self._tools.start, self._tools.end
        if self._state == "saying":
            if self._after_call:  # spaces are no text there, as before a call
                self._held = self._held.lstrip()
                self._after_call = not self._held
            before, found, _ = self._held.partition(start)
            kept = 0 if last else _begun(self._held, start)
            if not found:
                before = before[: len(before) - kept]
                parts.append(self._say(before if last else before.rstrip()))  # before a call spaces are no text
                return False
            parts.append(self._say(before.rstrip()))
            self._held = self._held.lstrip()
            self._state = "calling"
            return True
        body = self._held.removeprefix(start)
        place = body.find(end) if end else (len(body) if last else -1)
        if place < 0 and not last:
            return False
        calls = self._tools.calls(body[:place]) if place >= 0 else self._tools.calls(body)
        self._state = "saying"
        if not calls:
            parts.append(self._say(self._held[: len(start) + max(place, 0) + len(end)] if place >= 0 else self._held))
            return bool(self._held)
        self._held = body[place + len(end) :] if place >= 0 else ""
        self._after_call = True
        self._give(parts, calls)
        return bool(self._held)

    def _give(self, parts: list[AnswerPart], calls: Sequence[ToolCall]) -> None:
        for call in calls:
            if not (self._one and self.called):
                parts.append(AnswerPart("call", call=call))
                self.called += 1


def _begun(text: str, mark: str) -> int:
    """How many characters at a text's end may be the beginning of a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)


def chat_request(body: Mapping[str, Any], names: Mapping[str, str]) -> ChatRequest:
    """The chat request that stands for one of another protocol.

    Args:
        body: of the chat request.
        names: what its fields are called there, if not the same.

    Raises:
        ApiError: it is refused, with the field as it is called there.
    """
    try:
        return ChatRequest.model_validate({key: value for key, value in body.items() if value is not None})
    except ValidationError as error:
        first: dict[str, Any] = dict(error.errors()[0])
        where = list(first["loc"]) or [first.get("ctx", {}).get("field") or "messages"]
        field = str(where[0])
        # a message here is not always one there
        rest = [] if field == "messages" or not first["loc"] else where[1:]
        context = {key: value for key, value in first.get("ctx", {}).items() if key != "field"}
        raise ApiError.invalid([first | {"loc": ("body", names.get(field, field), *rest), "ctx": context}]) from None


class Chat:
    """Made for each request.

    Args:
        request: of the client.
        tokenizer: of the expert that answers.
    """

    def __init__(self, request: ChatRequest, tokenizer: ChatTokenizer) -> None:
        self._request, self._tokenizer = request, tokenizer
        template = str(tokenizer.tokenizer.chat_template or "")
        self._thinks = THINK in template and THOUGHT in template
        self._format = tool_format(template)
        self._forced = bool(request.demanded)
        tools = [tool.for_template() for tool in request.offered]
        self.prompt = Conversation(request.conversation(), tools, request.chat_template_kwargs, request.continues)
        self._strict = request.strict and not self._forced
        if self._strict and not self._format.is_marked_json:
            raise ConfigError(
                f"tools: strict: this expert writes calls as {self._format.name}, whose beginning no grammar can tell "
                "from text; leave strict out, or demand a call (tool_choice 'required' or a function's name)"
            )

    @cached_property
    def _thinking(self) -> bool:
        """Whether the template itself begins a thought."""
        return self._thinks and self._tokenizer.render(self.prompt).rstrip().endswith(THINK)

    @cached_property
    def grammar(self) -> Grammar | None:
        """What the answer must be.

        Raises:
            ConfigError: there is nothing that could follow it, or a tool's schema cannot be used.
        """
        after = THOUGHT if self._thinking else ""
        if (self._forced or self._strict) and not is_available():
            raise ConfigError(f"tools: a call that fits its schema {EXTRA}")
        if self._forced:
            return calls_grammar([tool.for_template() for tool in self._request.demanded], after)
        if self._strict:
            start, end = self._format.start, self._format.end
            tools = [tool.for_template(any_arguments=not tool.function.strict) for tool in self._request.offered]
            are_tokens = {start, end} <= set(self._tokenizer.hidden.values())
            return marked(calls_grammar(tools).text, start, end, are_tokens=are_tokens, after=after)
        found = self._request.grammar
        return None if found is None else Grammar(found.kind, found.text, after)

    @property
    def shown(self) -> tuple[str, ...]:
        """Special tokens whose texts are needed to read the answer."""
        tools = self._format.shown if self._request.offered and not self._forced else ()
        thoughts = (THINK, THOUGHT) if self._thinks else ()
        return tuple({*tools, *thoughts, *self._marks} & set(self._tokenizer.hidden.values()))

    @property
    def _marks(self) -> tuple[str, ...]:
        if not self._request.offered or self._forced:
            return ()
        return tuple(mark for mark in (self._format.start, self._format.end) if mark)

    def reader(self) -> AnswerReader:
        """For one answer."""
        offered = self._request.offered
        return AnswerReader(
            thinks=self._thinks,
            thinking=self._thinking,
            tools=(JSON if self._forced else self._format) if offered else None,
            names=[tool.function.name for tool in offered],
            forced=self._forced,
            one=self._forced or not self._request.parallel_tool_calls,
        )

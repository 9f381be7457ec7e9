"""A chat request, for the expert that answers it: what its template is given, and how its answer is read."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from meswitch.engine.grammar import EXTRA, Grammar, is_available
from meswitch.errors import ConfigError
from meswitch.server.errors import ApiError
from meswitch.server.reader import THINK, THOUGHT, AnswerReader
from meswitch.server.schema import ChatRequest
from meswitch.server.tools import JSON, calls_grammar, tool_format
from meswitch.tokenizer import ChatTokenizer, Conversation


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
        for tool in request.offered:
            if tool.function.strict and not self._forced:
                raise ConfigError(
                    "tools: strict is kept where a call is demanded (tool_choice 'required' or a function's name); "
                    "leave strict out, or demand a call"
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
        if self._forced:
            if not is_available():
                raise ConfigError(f"tool_choice: a demanded call {EXTRA}")
            return calls_grammar([tool.for_template() for tool in self._request.demanded], after)
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

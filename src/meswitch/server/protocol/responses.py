"""`POST /v1/responses`, OpenAI's newer protocol, as a chat request. Nothing is stored: a client sends its history."""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from meswitch.engine import Chunk
from meswitch.engine import Request as EngineRequest
from meswitch.server.errors import ApiError
from meswitch.server.protocol.answers import Answer, AnswerChat, Event, Format, Usage
from meswitch.server.protocol.chat import AnswerPart, Chat, chat_request
from meswitch.server.protocol.schema import Metadata, Strict, Text, content_text, neutral_only, refuse

_TEXTS = ("text", "input_text", "output_text")
_IGNORED = {"user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}, {"effort": None, "summary": None}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "stream_options": ({}, {"include_obfuscation": False}),
}
# A chat request's field -> what it is called here.
_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text"}


def _input(value: Any) -> Any:
    """Messages of a chat from a text or a list of items."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("give a text or a list of items")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise refuse("bad_value", (index,), "an item is an object")
        messages.append(_message(index, {key: one for key, one in item.items() if one is not None}))
    return _joined(messages)


def _message(index: int, item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        content = content_text(item.get("content"), _TEXTS)
        if not isinstance(content, str):
            raise refuse("bad_value", (index, "content"), "a text, or a list of text parts")
        return {"role": item.get("role"), "content": content}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        output = content_text(item.get("output"), _TEXTS)
        return {"role": "tool", "content": output, "tool_call_id": item.get("call_id")}
    if kind == "reasoning":
        parts = [*item.get("content", ()), *item.get("summary", ())]
        thoughts = [part.get("text") for part in parts if isinstance(part, Mapping)]
        return {"role": "assistant", "content": "", "reasoning_content": "\n".join(t for t in thoughts if t)}
    raise refuse("unsupported", (index, "type"), f"{kind!r} is not supported by this server")


def _joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the assistant thought, said and called in one turn, which comes as several items, as one message."""
    out: list[dict[str, Any]] = []
    for message in messages:
        last = out[-1] if out else {}
        if message["role"] == "assistant" == last.get("role") and not (last.get("content") and message["content"]):
            if last.get("tool_calls") and message["content"]:
                out.append(message)
                continue
            out[-1] = last | {key: value for key, value in message.items() if value}
            out[-1]["tool_calls"] = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
        else:
            out.append(message)
    return out


class TextOptions(Strict):
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] = "medium"

    def response_format(self) -> dict[str, Any] | None:
        """As a chat request has it: there the schema's fields are one level deeper."""
        if self.format is None or self.format.get("type") != "json_schema":
            return self.format
        return {"type": "json_schema", "json_schema": {k: v for k, v in self.format.items() if k != "type"}}


class ResponsesRequest(Strict):
    model: str = Field(min_length=1)
    input: Annotated[list[dict[str, Any]], BeforeValidator(_input)]
    instructions: Text = ""
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    stream: bool = False
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = Field(default_factory=TextOptions)
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        return neutral_only(data, _IGNORED, _NEUTRAL)

    def chat(self) -> dict[str, Any]:
        """The same as a chat request's body."""
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        tools = [
            {"type": tool.get("type"), "function": {key: value for key, value in tool.items() if key != "type"}}
            for tool in self.tools
        ]
        choice: Any = self.tool_choice
        if isinstance(choice, dict) and "name" in choice:
            choice = {"type": choice.get("type"), "function": {"name": choice["name"]}}
        return {
            "model": self.model,
            "messages": [*system, *self.input],
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text.response_format(),
            "metadata": self.metadata,
        }


class ResponsesFormat(Format):
    """Args: model: who answers. body: what was asked. chat: how the answer is read."""

    last = ""

    def __init__(self, model: str, body: ResponsesRequest, chat: Chat) -> None:
        self._id, self._created = f"resp_{uuid.uuid4().hex}", time.time()
        self._model, self._body, self._chat = model, body, chat
        self._reader = chat.reader()
        self._items: list[dict[str, Any]] = []
        self._number = 0
        self._reason = "stop"

    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        (answer,) = answers
        for part in self._reader.feed(answer.text, last=True):
            self._add(part)
        self._close([])
        return Event(self._response(answer.finish_reason, usage))

    def begin(self, request: EngineRequest) -> list[BaseModel]:
        started = self._response(None, None)
        return [self._event(f"response.{name}", response=started) for name in ("created", "in_progress")]

    def chunks(self, index: int, chunk: Chunk, request: EngineRequest) -> list[BaseModel]:
        events: list[BaseModel] = []
        for part in self._reader.feed(chunk.text, last=chunk.finish_reason is not None):
            events += self._add(part)
        if chunk.finish_reason is not None:
            self._close(events)
            self._reason = chunk.finish_reason
        return events

    def end(self, usage: Usage) -> list[BaseModel]:
        response = self._response(self._reason, usage)
        return [self._event(f"response.{response['status']}", response=response)]

    def event(self, chunk: BaseModel) -> str:
        return f"event: {chunk.model_dump()['type']}\ndata: {chunk.model_dump_json()}\n\n"

    def failure(self, error: ApiError) -> str:
        said = error.body()["error"]
        event = self._event("error", message=said["message"], code=said["code"], param=said["param"])
        return self.event(event)

    def _add(self, part: AnswerPart) -> list[BaseModel]:
        """Write a part into the output; what is streamed of it."""
        events: list[BaseModel] = []
        kind = {"reasoning": "reasoning", "content": "message", "call": "function_call"}[part.kind]
        open_item = self._items[-1] if self._items and self._items[-1]["status"] == "in_progress" else None
        if open_item is None or open_item["type"] != kind or part.call is not None:
            self._close(events)
            self._open(kind, part, events)
        item, place = self._items[-1], len(self._items) - 1
        where = {"item_id": item["id"], "output_index": place}
        if part.call is not None:
            item["arguments"] = part.call.arguments
            arguments = part.call.arguments
            events.append(self._event("response.function_call_arguments.delta", **where, delta=arguments))
            named = {"name": part.call.name, "arguments": arguments}
            events.append(self._event("response.function_call_arguments.done", **where, **named))
            self._close(events)
            return events
        item["content"][0]["text"] += part.text
        name = "output_text" if kind == "message" else "reasoning_text"
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        delta = {"content_index": 0, "delta": part.text, **more}
        events.append(self._event(f"response.{name}.delta", **where, **delta))
        return events

    def _open(self, kind: str, part: AnswerPart, events: list[BaseModel]) -> None:
        item: dict[str, Any] = {"type": kind, "status": "in_progress"}
        if part.call is not None:
            item |= {"id": f"fc_{uuid.uuid4().hex}", "call_id": part.call.id, "name": part.call.name, "arguments": ""}
        elif kind == "message":
            item |= {"id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "content": []}
        else:
            item |= {"id": f"rs_{uuid.uuid4().hex}", "summary": [], "content": []}
        self._items.append(item)
        place = len(self._items) - 1
        events.append(self._event("response.output_item.added", output_index=place, item=dict(item)))
        if part.call is None:
            content: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            content = content if kind == "message" else {"type": "reasoning_text", "text": ""}
            where = {"item_id": item["id"], "output_index": place, "content_index": 0}
            events.append(self._event("response.content_part.added", **where, part=dict(content)))
            item["content"] = [content]

    def _close(self, events: list[BaseModel]) -> None:
        """End the item that is written."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item, place = self._items[-1], len(self._items) - 1
        item["status"] = "completed"
        if item["type"] != "function_call":
            content = item["content"][0]
            where = {"item_id": item["id"], "output_index": place, "content_index": 0}
            name = content["type"]
            more: dict[str, Any] = {"logprobs": []} if name == "output_text" else {}
            events.append(self._event(f"response.{name}.done", **where, text=content["text"], **more))
            events.append(self._event("response.content_part.done", **where, part=content))
        events.append(self._event("response.output_item.done", output_index=place, item=item))

    def _event(self, kind: str, **fields: Any) -> Event:
        event = Event({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return event

    def _response(self, reason: str | None, usage: Usage | None) -> dict[str, Any]:
        """The response as it is now. reason: why the answer has ended, None while it goes on."""
        body = self._body
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        counted = None
        if usage is not None:
            counted = {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(self._created),
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions or None,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": [dict(item) for item in self._items],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.text.format or {"type": "text"}},
            "tool_choice": body.tool_choice,
            "tools": body.tools,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": counted,
            "metadata": body.metadata,
        }


def response_routes(answer: AnswerChat) -> APIRouter:
    """`/v1/responses`. answer: answers a chat request in a given shape."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer in OpenAI's newer protocol."""
        chat = chat_request(body.chat(), _NAMES)
        return await answer(chat, request, lambda expert, how: ResponsesFormat(expert, body, how), "input")

    return router

"""`POST /v1/messages`, Anthropic's protocol, as a chat request."""

import json
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from meswitch.engine import Chunk
from meswitch.engine import Request as EngineRequest
from meswitch.server.errors import ANTHROPIC_PATH, ApiError
from meswitch.server.protocol.answers import Answer, AnswerChat, Event, Format, Usage
from meswitch.server.protocol.chat import AnswerPart, Chat, chat_request
from meswitch.server.protocol.schema import ChatRequest, SomeText, Strict, Text, content_text, neutral_only, refuse

_IGNORED = {"service_tier", "metadata", "betas"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "mcp_servers": ([],),
    "output_config": ({},),
    "output_format": (),
    "thinking": ({"type": "disabled"},),
}
_NAMES = {"stop": "stop_sequences"}  # a chat request's field -> what it is called here


def _system(value: Any) -> Any:
    return content_text(value)


def _messages(value: Any) -> Any:
    """Messages of a chat."""
    if not isinstance(value, list):
        raise ValueError("give a list of messages")
    out: list[dict[str, Any]] = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or message.get("role") not in ("user", "assistant", "system"):
            raise refuse("bad_value", (index,), "a message is an object with the role user or assistant")
        content = message.get("content")
        if isinstance(content, str):
            out.append({"role": message["role"], "content": content})
        elif isinstance(content, list):
            out += _blocks(index, message["role"], content)
        else:
            raise refuse("bad_value", (index, "content"), "a text or a list of blocks")
    return out


def _blocks(index: int, role: str, blocks: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages of a chat that stand for the blocks of one message."""
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for place, block in enumerate(blocks):
        where = (index, "content", place)
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input", {}))}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            content = content_text(block.get("content", ""))
            results.append({"role": "tool", "content": content, "tool_call_id": block.get("tool_use_id")})
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking", "")))
        else:
            raise refuse("unsupported", where, f"a block of the type {kind!r} is not supported here")
    if role != "assistant":
        return [*results, *([{"role": role, "content": "\n".join(texts)}] if texts or not results else [])]
    message: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return [message]


class AnthropicTool(Strict):
    name: Text
    input_schema: dict[str, Any]
    description: Text = ""
    type: Literal["custom"] = "custom"
    cache_control: Any = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool = False

    def of_chat(self) -> Any:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return {"auto": "auto", "any": "required", "none": "none"}[self.type]


class CountRequest(Strict):
    """What `/v1/messages/count_tokens` takes, and `/v1/messages` as well."""

    model: str = Field(min_length=1)
    messages: Annotated[list[dict[str, Any]], BeforeValidator(_messages)] = Field(min_length=1)
    system: Annotated[Text, BeforeValidator(_system)] = ""
    tools: list[AnthropicTool] = Field(default_factory=list)
    tool_choice: ToolChoice = Field(default_factory=lambda: ToolChoice(type="auto"))

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        return neutral_only(data, _IGNORED, _NEUTRAL)

    def chat(self) -> dict[str, Any]:
        """The same as a chat request's body."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        prefill = {"continue_final_message": True} if self.messages[-1]["role"] == "assistant" else {}
        functions = [
            {"name": tool.name, "description": tool.description, "parameters": tool.input_schema} for tool in self.tools
        ]
        return {
            "model": self.model,
            "messages": [*system, *self.messages],
            "tools": [{"type": "function", "function": function} for function in functions],
            "tool_choice": self.tool_choice.of_chat(),
            "parallel_tool_calls": not self.tool_choice.disable_parallel_tool_use,
            **prefill,
        }


class MessagesRequest(CountRequest):
    """`POST /v1/messages`."""

    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    stop_sequences: list[SomeText] = Field(default_factory=list)
    stream: bool = False

    def chat(self) -> dict[str, Any]:
        return super().chat() | {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "stream": self.stream,
        }


class MessagesFormat(Format):
    """Args: model: who answers. chat: how the answer is read."""

    last = ""

    def __init__(self, model: str, chat: Chat) -> None:
        self._id, self._model = f"msg_{uuid.uuid4().hex}", model
        self._reader = chat.reader()
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False
        self._ended: dict[str, Any] = {}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        (answer,) = answers
        for part in self._reader.feed(answer.text, last=True):
            self._add(part)
        return self._message(self._end_of(answer.finish_reason, answer.request), usage)

    def begin(self, request: EngineRequest) -> list[BaseModel]:
        usage = Usage(prompt_tokens=len(request.prompt), completion_tokens=0, total_tokens=len(request.prompt))
        message = self._message({"stop_reason": None, "stop_sequence": None}, usage)
        return [Event({"type": "message_start", "message": message.model_dump()})]

    def chunks(self, index: int, chunk: Chunk, request: EngineRequest) -> list[BaseModel]:
        events: list[BaseModel] = []
        for part in self._reader.feed(chunk.text, last=chunk.finish_reason is not None):
            events += self._add(part)
        if chunk.finish_reason is not None:
            events += self._close()
            self._ended = self._end_of(chunk.finish_reason, request)
        return events

    def end(self, usage: Usage) -> list[BaseModel]:
        counted = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
        return [
            Event({"type": "message_delta", "delta": self._ended, "usage": counted}),
            Event({"type": "message_stop"}),
        ]

    def event(self, chunk: BaseModel) -> str:
        return f"event: {chunk.model_dump()['type']}\ndata: {chunk.model_dump_json()}\n\n"

    def failure(self, error: ApiError) -> str:
        return f"event: error\ndata: {json.dumps(error.anthropic_body())}\n\n"

    def _add(self, part: AnswerPart) -> list[BaseModel]:
        events: list[BaseModel] = []
        kind = {"reasoning": "thinking", "content": "text", "call": "tool_use"}[part.kind]
        if part.call is not None:
            events += self._close()
            arguments = json.loads(part.call.arguments)
            block = {"type": kind, "id": part.call.id, "name": part.call.name, "input": arguments}
            self._blocks.append(block)
            events.append(self._event("content_block_start", content_block=block | {"input": {}}))
            delta = {"type": "input_json_delta", "partial_json": part.call.arguments}
            events.append(self._event("content_block_delta", delta=delta))
            events.append(self._event("content_block_stop"))
            return events
        if not self._is_open or self._blocks[-1]["type"] != kind:
            events += self._close()
            block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            self._blocks.append(block)
            self._is_open = True
            events.append(self._event("content_block_start", content_block=dict(block)))
        self._blocks[-1][kind] += part.text
        events.append(self._event("content_block_delta", delta={"type": f"{kind}_delta", kind: part.text}))
        return events

    def _close(self) -> list[BaseModel]:
        if not self._is_open:
            return []
        self._is_open = False
        return [self._event("content_block_stop")]

    def _event(self, kind: str, **fields: Any) -> Event:
        return Event({"type": kind, "index": len(self._blocks) - 1, **fields})

    def _end_of(self, finish_reason: str, request: EngineRequest) -> dict[str, Any]:
        stop = request.stopped_by if isinstance(request.stopped_by, str) else None
        reason = "max_tokens" if finish_reason == "length" else "end_turn" if stop is None else "stop_sequence"
        if self._reader.called:
            reason, stop = "tool_use", None
        return {"stop_reason": reason, "stop_sequence": stop}

    def _message(self, ended: Mapping[str, Any], usage: Usage) -> Event:
        counted = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
        fields = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return Event({**fields, "content": [dict(block) for block in self._blocks], **ended, "usage": counted})


def message_routes(answer: AnswerChat, count: Callable[[ChatRequest, Request], Awaitable[int]]) -> APIRouter:
    """`/v1/messages`.

    Args:
        answer: answers a chat request in a given shape.
        count: tokens of a chat request's prompt.
    """
    router = APIRouter()

    @router.post(ANTHROPIC_PATH)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer in Anthropic's protocol."""
        return await answer(chat_request(body.chat(), _NAMES), request, MessagesFormat, "messages")

    @router.post(f"{ANTHROPIC_PATH}/count_tokens")
    async def count_tokens(body: CountRequest, request: Request) -> Response:
        """How many tokens a request has."""
        return JSONResponse({"input_tokens": await count(chat_request(body.chat(), _NAMES), request)})

    return router

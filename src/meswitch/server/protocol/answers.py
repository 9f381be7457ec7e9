"""What clients get: OpenAI's response objects, and the shape of each endpoint's answers, whole or in chunks.

Every object names the expert.
"""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel, RootModel, SerializerFunctionWrapHandler, model_serializer

from meswitch.engine import Chunk, Request
from meswitch.engine.scores import TokenLogprobs
from meswitch.server.errors import ApiError
from meswitch.server.protocol.chat import AnswerPart, AnswerReader, Chat
from meswitch.server.protocol.schema import ChatRequest, CompletionRequest
from meswitch.tokenizer import ChatTokenizer

_LEAST = -9999.0  # JSON has no infinity; vLLM writes the same


class _Lean(BaseModel):
    """Leaves out fields that are None; the other objects write them as null, which clients rely on."""

    @model_serializer(mode="wrap")
    def _without_nulls(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value is not None}


class Event(RootModel[dict[str, Any]]):
    """An object whose fields the protocols of `responses` and `messages` fix."""


class Usage(BaseModel):
    """Tokens: the prompt's (once, however many answers), and all answers', end tokens included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that could have come. bytes: a part of a character has no text of its own."""

    token: str
    logprob: float
    bytes: list[int]


class LogprobToken(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[LogprobToken]
    refusal: None = None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class FunctionCall(BaseModel):
    name: str
    arguments: str


class MadeCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class CallDelta(MadeCall):
    """A whole call: its arguments are not streamed in pieces."""

    index: int


class ChatMessage(BaseModel):
    """content: null where there are calls only."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[MadeCall] | None = None

    @model_serializer(mode="wrap")
    def _only_what_is_there(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = ("reasoning_content", "tool_calls")
        return {key: value for key, value in write(self).items() if value is not None or key not in optional}


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: str | int | None = None  # vLLM's: the stop text or token of the request that ended the answer


class ChatCompletion(BaseModel):
    """model: the expert that answered."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(_Lean):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(_Lean):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class TextCompletion(_Lean):
    """A whole answer, or a piece of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(_Lean):
    """One row of `/v1/models`.

    Args:
        kind: `base`, `expert` or `router`.
        parent: the base of an expert.
        max_model_len: tokens of a prompt and its answer.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "meswitch"
    kind: Literal["base", "expert", "router"]
    description: str
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(_Lean):
    """Whether the engine can answer.

    Args:
        waiting: requests that do.
        running: requests that do.
        auto: whether the router is there.
    """

    status: Literal["ok", "failed"]
    reason: str | None = None
    waiting: int
    running: int
    auto: bool


def chat_logprobs(tokens: Sequence[TokenLogprobs], tokenizer: ChatTokenizer) -> ChatLogprobs:
    """As `/v1/chat/completions` has them."""

    def top(token: int, logprob: float) -> TopLogprob:
        spelt = tokenizer.token_bytes(token)
        return TopLogprob(token=spelt.decode(errors="replace"), logprob=max(logprob, _LEAST), bytes=list(spelt))

    return ChatLogprobs(
        content=[
            LogprobToken(
                **top(one.token, one.logprob).model_dump(),
                top_logprobs=[top(token, logprob) for token, logprob in one.top],
            )
            for one in tokens
        ]
    )


def text_logprobs(
    tokens: Sequence[TokenLogprobs | None], ids: Sequence[int], tokenizer: ChatTokenizer, top: int, start: int
) -> TextLogprobs:
    """As `/v1/completions` has them.

    Args:
        tokens: None for a prompt's first token, which nothing predicts.
        ids: of the tokens.
        tokenizer: of the expert.
        top: how many of the likeliest to name; the token itself is always named.
        start: characters before the first token.
    """
    names = [_name(token, tokenizer) for token in ids]
    offsets, at = [], start
    for name in names:
        offsets.append(at)
        at += len(name)
    tops: list[dict[str, float] | None] = []
    for one in tokens:
        if one is None:
            tops.append(None)
            continue
        found: dict[str, float] = {}
        for token, logprob in (*one.top[:top], (one.token, one.logprob)):
            found.setdefault(_name(token, tokenizer), max(logprob, _LEAST))
        tops.append(found)
    return TextLogprobs(
        tokens=names,
        token_logprobs=[None if one is None else max(one.logprob, _LEAST) for one in tokens],
        top_logprobs=tops,
        text_offset=offsets,
    )


def _name(token: int, tokenizer: ChatTokenizer) -> str:
    """A token's text; of a part of a character its bytes, as OpenAI writes them, so that no two tokens look alike."""
    spelt = tokenizer.token_bytes(token)
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer.

    Args:
        text: as the engine wrote it.
        finish_reason: `stop` or `length`.
        request: what it answers, done.
        logprobs: of its tokens, if they were asked for.
    """

    text: str
    finish_reason: str
    request: Request
    logprobs: tuple[TokenLogprobs, ...] = ()


class Format(ABC):
    """Writes the answers of one request."""

    last = "data: [DONE]\n\n"
    """What a stream ends with."""

    @abstractmethod
    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """All answers -> the response."""

    @abstractmethod
    def chunks(self, index: int, chunk: Chunk, request: Request) -> list[BaseModel]:
        """A piece of answer `index` -> what is streamed for it."""

    def begin(self, request: Request) -> list[BaseModel]:
        """What is streamed before the first piece."""
        return []

    def end(self, usage: Usage) -> list[BaseModel]:
        """What is streamed after the last piece."""
        return []

    def event(self, chunk: BaseModel) -> str:
        """One server-sent event."""
        return f"data: {chunk.model_dump_json()}\n\n"

    def failure(self, error: ApiError) -> str:
        """The event that ends a stream which has begun."""
        return f"data: {json.dumps(error.body())}\n\n"


AnswerChat = Callable[[ChatRequest, HttpRequest, Callable[[str, Chat], Format], str], Awaitable[Response]]
"""Answers a chat request in the shape that is made for (who answers, the chat); the text names its prompt's field."""


class ChatFormat(Format):
    """`/v1/chat/completions`.

    Args:
        model: who answers.
        request: of the client.
        chat: how the answers are read.
    """

    def __init__(self, model: str, request: ChatRequest, chat: Chat) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model, self._request, self._chat = model, request, chat
        self._readers: dict[int, AnswerReader] = {}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return ChatCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, index: int, answer: Answer) -> ChatChoice:
        parts = self._chat.reader().feed(answer.text, last=True)
        calls = [MadeCall(id=p.call.id, function=_function(p)) for p in parts if p.call is not None]
        content = "".join(part.text for part in parts if part.kind == "content")
        message = ChatMessage(
            content=content if content or not calls else None,
            reasoning_content="".join(part.text for part in parts if part.kind == "reasoning") or None,
            tool_calls=calls or None,
        )
        logprobs = None
        if self._request.logprobs:
            logprobs = chat_logprobs(answer.logprobs, answer.request.tokenizer)
        reason = "tool_calls" if calls else answer.finish_reason
        stopped = answer.request.stopped_by
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=reason, stop_reason=stopped)

    def chunks(self, index: int, chunk: Chunk, request: Request) -> list[BaseModel]:
        out: list[BaseModel] = []
        if index not in self._readers:
            self._readers[index] = self._chat.reader()
            out.append(self._chunk(index, Delta(role="assistant", content="")))
        reader = self._readers[index]
        before = reader.called
        parts = reader.feed(chunk.text, last=chunk.finish_reason is not None)
        deltas = []
        for part in parts:
            if part.call is not None:
                call = CallDelta(index=before, id=part.call.id, function=_function(part))
                deltas.append(Delta(tool_calls=[call]))
                before += 1
            elif part.kind == "reasoning":
                deltas.append(Delta(reasoning_content=part.text))
            else:
                deltas.append(Delta(content=part.text))
        logprobs = None
        if self._request.logprobs and chunk.logprobs:
            logprobs = chat_logprobs(chunk.logprobs, request.tokenizer)
            deltas = deltas or [Delta(content="")]
        for number, delta in enumerate(deltas):
            made = self._chunk(index, delta)
            if number == 0:
                made.choices[0].logprobs = logprobs
            out.append(made)
        if chunk.finish_reason is not None:
            reason = "tool_calls" if reader.called else chunk.finish_reason
            out.append(self._chunk(index, Delta(), reason))
        return out

    def end(self, usage: Usage) -> list[BaseModel]:
        if not self._request.include_usage:
            return []
        return [ChatChunk(id=self._id, created=self._created, model=self._model, choices=[], usage=usage)]

    def _chunk(self, index: int, delta: Delta, finish_reason: str | None = None) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=finish_reason)
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=[choice])


class TextFormat(Format):
    """`/v1/completions`.

    Args:
        model: who answers.
        request: of the client.
    """

    def __init__(self, model: str, request: CompletionRequest) -> None:
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model, self._request = model, request
        self._written: dict[int, int] = {}  # characters of each answer's logged tokens

    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        choices = []
        for index, answer in enumerate(self._best(answers)):
            text = self._echoed(index, answer.request) + answer.text
            logprobs = self._logprobs(index, answer.logprobs, answer.request)
            choice = TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=answer.finish_reason)
            choice.stop_reason = answer.request.stopped_by
            choices.append(choice)
        return self._completion(choices, usage)

    def _best(self, answers: Sequence[Answer]) -> list[Answer]:
        """Of each prompt's answers the `n` with the highest log probability a token."""
        made, wanted = self._request.answers, self._request.n
        if made == wanted:
            return list(answers)
        best: list[Answer] = []
        for start in range(0, len(answers), made):
            best += sorted(answers[start : start + made], key=_mean_logprob, reverse=True)[:wanted]
        return best

    def chunks(self, index: int, chunk: Chunk, request: Request) -> list[BaseModel]:
        text = chunk.text if index in self._written else self._echoed(index, request) + chunk.text
        logprobs = self._logprobs(index, chunk.logprobs, request)
        choice = TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=chunk.finish_reason)
        return [self._completion([choice])]

    def end(self, usage: Usage) -> list[BaseModel]:
        return [self._completion([], usage)] if self._request.include_usage else []

    def _echoed(self, index: int, request: Request) -> str:
        """The prompt, if it is wanted before its answer."""
        if not self._request.echo:
            return ""
        prompt = self._request.prompt[index // self._request.n]
        return prompt if isinstance(prompt, str) else request.tokenizer.decode(prompt)

    def _logprobs(self, index: int, made: Sequence[TokenLogprobs], request: Request) -> TextLogprobs | None:
        """Of new tokens, and of the prompt before the first ones."""
        begun = index in self._written
        start = self._written.setdefault(index, 0)
        if self._request.logprobs is None:
            return None
        tokens: list[TokenLogprobs | None] = []
        ids: list[int] = []
        if self._request.echo and not begun:
            tokens += request.sampling.prompt_logprobs
            ids += request.prompt
        tokens += made
        ids += [one.token for one in made]
        found = text_logprobs(tokens, ids, request.tokenizer, self._request.logprobs, start)
        self._written[index] = start + sum(map(len, found.tokens))
        return found

    def _completion(self, choices: list[TextChoice], usage: Usage | None = None) -> TextCompletion:
        return TextCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)


def _function(part: AnswerPart) -> FunctionCall:
    assert part.call is not None
    return FunctionCall(name=part.call.name, arguments=part.call.arguments)


def _mean_logprob(answer: Answer) -> float:
    return sum(one.logprob for one in answer.logprobs) / max(len(answer.logprobs), 1)

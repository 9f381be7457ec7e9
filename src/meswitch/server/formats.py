"""The shapes of an answer, whole or in chunks: each endpoint has one. They name the expert in every object."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel

from meswitch.engine import Chunk, Request
from meswitch.engine.scores import TokenLogprobs
from meswitch.server.answers import (
    Call,
    CallDelta,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatMessage,
    Delta,
    FunctionCall,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    Usage,
)
from meswitch.server.chat import Chat
from meswitch.server.errors import ApiError
from meswitch.server.logprobs import chat_logprobs, text_logprobs
from meswitch.server.reader import AnswerReader, Part
from meswitch.server.schema import ChatRequest, CompletionRequest


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
        calls = [Call(id=p.call.id, function=_function(p)) for p in parts if p.call is not None]
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


def _function(part: Part) -> FunctionCall:
    assert part.call is not None
    return FunctionCall(name=part.call.name, arguments=part.call.arguments)


def _mean_logprob(answer: Answer) -> float:
    return sum(one.logprob for one in answer.logprobs) / max(len(answer.logprobs), 1)

"""The two shapes of an answer, chat and plain text, whole or in chunks."""

import time
import uuid
from typing import Protocol

from pydantic import BaseModel

from meswitch.server.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatMessage,
    Delta,
    TextChoice,
    TextCompletion,
    Usage,
)


class Format(Protocol):
    """Writes the answers of one request; every object names the expert."""

    def whole(self, answers: list[tuple[str, str]], usage: Usage) -> BaseModel:
        """(text, finish reason) of all answers -> the response."""
        ...

    def chunks(self, index: int, text: str, finish_reason: str | None, *, first: bool) -> list[BaseModel]:
        """A piece of answer `index` -> what is streamed for it."""
        ...

    def usage(self, usage: Usage) -> BaseModel:
        """The last chunk, if the client asked for it."""
        ...


class ChatFormat:
    """`/v1/chat/completions`."""

    def __init__(self, model: str) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def whole(self, answers: list[tuple[str, str]], usage: Usage) -> BaseModel:
        choices = [
            ChatChoice(index=i, message=ChatMessage(content=text), finish_reason=reason)
            for i, (text, reason) in enumerate(answers)
        ]
        return ChatCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def chunks(self, index: int, text: str, finish_reason: str | None, *, first: bool) -> list[BaseModel]:
        out: list[BaseModel] = []
        if first:
            out.append(self._chunk(index, Delta(role="assistant", content="")))
        if text:
            out.append(self._chunk(index, Delta(content=text)))
        if finish_reason is not None:
            out.append(self._chunk(index, Delta(), finish_reason))
        return out

    def usage(self, usage: Usage) -> BaseModel:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=[], usage=usage)

    def _chunk(self, index: int, delta: Delta, finish_reason: str | None = None) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=finish_reason)
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=[choice])


class TextFormat:
    """`/v1/completions`."""

    def __init__(self, model: str) -> None:
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def whole(self, answers: list[tuple[str, str]], usage: Usage) -> BaseModel:
        choices = [TextChoice(index=i, text=text, finish_reason=reason) for i, (text, reason) in enumerate(answers)]
        return self._completion(choices, usage)

    def chunks(self, index: int, text: str, finish_reason: str | None, *, first: bool) -> list[BaseModel]:
        return [self._completion([TextChoice(index=index, text=text, finish_reason=finish_reason)])]

    def usage(self, usage: Usage) -> BaseModel:
        return self._completion([], usage)

    def _completion(self, choices: list[TextChoice], usage: Usage | None = None) -> TextCompletion:
        return TextCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

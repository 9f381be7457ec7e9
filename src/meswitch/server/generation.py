"""From the engine's threads into the event loop, and onto the wire.

All answers to one HTTP request are one stream of pieces (`Generation`). They are sent whole or as server-sent events; a
client that goes away ends its requests.

A step of the engine gives hundreds of streams a piece at the same moment, and when they have ended, their clients ask
again at the same moment. What comes in crowds is done a few at a time (`Crowd`): in between the event loop looks at
everything else, such as a question to `/health`.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from meswitch.engine import Chunk, Engine
from meswitch.engine import Request as EngineRequest
from meswitch.engine.scores import TokenLogprobs
from meswitch.errors import MeswitchError
from meswitch.server.errors import ApiError
from meswitch.server.logs import GONE
from meswitch.server.protocol.answers import Answer, Format, Usage
from meswitch.server.protocol.chat import Chat
from meswitch.server.protocol.schema import GenerationRequest
from meswitch.threads import Workers
from meswitch.tokenizer import ChatTokenizer, Prompt

T = TypeVar("T")


class Crowd:
    """Calls of one kind that wait for their turn in one event loop.

    Args:
        loop: makes the calls.
        at_once: calls before it looks at other things.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, at_once: int) -> None:
        self._loop, self._at_once = loop, at_once
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_woken = False

    def post(self, call: Callable[[], None]) -> None:
        """From any thread, which must survive a loop that was closed meanwhile: then nobody waits any more.

        The loop is woken once for all calls that wait.
        """
        if self._loop.is_closed():
            return
        self._waiting.append(call)
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._call)

    def _call(self) -> None:
        for _ in range(self._at_once):
            if not self._waiting:
                self._is_woken = False
                if not self._waiting:  # looked at again: whoever posted before the line above did not wake the loop
                    return
                self._is_woken = True
            self._waiting.popleft()()
        self._loop.call_soon(self._call)


class Crowds:
    """The crowd of each event loop. at_once: see `Crowd`."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._of: WeakKeyDictionary[asyncio.AbstractEventLoop, Crowd] = WeakKeyDictionary()

    def here(self) -> Crowd:
        """Of the event loop that runs."""
        loop = asyncio.get_running_loop()
        return self._of.setdefault(loop, Crowd(loop, self._at_once))


PIECES = Crowds(16)  # of answers, a tenth of a millisecond each
ENCODERS = Workers(min(4, os.cpu_count() or 1), "meswitch-encode")


async def encoded(tokenizer: ChatTokenizer, prompt: Prompt, prompt_field: str, *, special: bool = True) -> list[int]:
    """Token ids, beside the event loop.

    Args:
        tokenizer: of the expert.
        prompt: a text or a conversation.
        prompt_field: the request's field that holds it, for messages.
        special: of a text, whether with the tokens that the tokenizer sets at its beginning or end.

    Raises:
        ApiError: it cannot be encoded.
    """

    def encode() -> list[int]:
        if isinstance(prompt, str) and not special:
            return tokenizer.text_ids(prompt, special=False)
        return tokenizer.encode(prompt)

    try:
        return await asyncio.get_running_loop().run_in_executor(ENCODERS, encode)
    except MeswitchError as error:
        raise ApiError.refused(error, prompt_field) from error


class Generation:
    """The running answers, `request.answers` for each prompt, in the order of the prompts.

    Make it with `start`. Whoever made it calls `cancel` in the end, whatever happened.
    """

    def __init__(
        self,
        engine: Engine,
        model: str,
        prompts: Sequence[Prompt],
        request: GenerationRequest,
        prompt_field: str,
        chat: Chat | None,
    ) -> None:
        if engine.failure is not None:
            raise _dead(engine)
        count = len(prompts) * request.answers
        if count > engine.max_queue:
            field = "n" if len(prompts) == 1 else prompt_field
            message = f"{field}: {count} answers in one request, the queue holds {engine.max_queue}; ask for less"
            raise ApiError(400, message, param=field, code="invalid_value")
        self._engine, self._model, self._prompts, self._request = engine, model, prompts, request
        self._choices, self._chat = request.answers, chat
        self._deliveries = PIECES.here()
        self._pieces: asyncio.Queue[tuple[int, Chunk]] = asyncio.Queue()
        self._requests: list[EngineRequest] = []

    @classmethod
    async def start(
        cls,
        engine: Engine,
        model: str,
        prompts: Sequence[Prompt],
        request: GenerationRequest,
        prompt_field: str,
        chat: Chat | None = None,
    ) -> "Generation":
        """Encode the prompts beside the event loop, which a long one would stop for everybody, and start the answers.

        Args:
            engine: answers.
            model: an expert's or the base's name.
            prompts: of this request.
            request: how they are continued.
            prompt_field: its field that holds them, for messages.
            chat: what the expert makes of a chat request.

        Raises:
            ApiError: the engine refuses one of them; then none runs.
        """
        made = cls(engine, model, prompts, request, prompt_field, chat)
        submitting = asyncio.get_running_loop().run_in_executor(ENCODERS, copy_context().run, made._submit)
        try:
            await asyncio.shield(submitting)
        except asyncio.CancelledError:  # the client is gone; the thread may still submit
            submitting.add_done_callback(made._abandoned)
            raise
        except MeswitchError as error:
            made.cancel()
            raise ApiError.refused(error, prompt_field, request.grammar_field) from error
        return made

    def _abandoned(self, submitted: "asyncio.Future[None]") -> None:
        submitted.exception()  # nobody waits for it
        self.cancel()

    def _submit(self) -> None:
        grammar = self._request.grammar if self._chat is None else self._chat.grammar
        shown = () if self._chat is None else self._chat.shown
        for prompt in self._prompts:
            tokens: Prompt = prompt
            for choice in range(self._choices):
                listen = partial(self._post, len(self._requests))
                params = self._request.params(choice, grammar, shown)
                started = self._engine.submit(tokens, model=self._model, params=params, on_chunk=listen)
                self._requests.append(started)
                tokens = started.prompt  # encoded once

    async def pieces(self) -> AsyncIterator[tuple[int, Chunk]]:
        """(index of the answer, piece) until all answers are complete.

        Raises:
            ApiError: an answer failed.
        """
        running = len(self._requests)
        while running:
            index, chunk = await self._pieces.get()
            if chunk.error is not None:
                raise _dead(self._engine) if self._engine.failure else ApiError(500, chunk.error, code="engine_error")
            running -= chunk.finish_reason is not None
            yield index, chunk

    async def whole(self) -> list[Answer]:
        """Every answer."""
        texts, reasons = [""] * len(self._requests), ["stop"] * len(self._requests)
        logprobs: list[tuple[TokenLogprobs, ...]] = [()] * len(self._requests)
        async for index, chunk in self.pieces():
            texts[index] += chunk.text
            logprobs[index] += chunk.logprobs
            reasons[index] = chunk.finish_reason or reasons[index]
        found = zip(texts, reasons, self._requests, logprobs, strict=True)
        return [Answer(text, reason, request, some) for text, reason, request, some in found]

    def request(self, index: int) -> EngineRequest:
        """The engine's, of answer `index`."""
        return self._requests[index]

    def usage(self) -> Usage:
        """Of complete answers."""
        prompt = sum(len(request.prompt) for request in self._requests[:: self._choices])
        completion = sum(len(request.tokens) for request in self._requests)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def cancel(self) -> None:
        """End what still runs."""
        for request in self._requests:
            self._engine.cancel(request)

    def _post(self, index: int, chunk: Chunk) -> None:
        self._deliveries.post(partial(self._pieces.put_nowait, (index, chunk)))


def _dead(engine: Engine) -> ApiError:
    return ApiError(503, f"the engine has stopped: {engine.failure}; restart the server", code="engine_unavailable")


class ClientGoneError(Exception):
    """The client closed the connection before the answer was complete."""


async def whole_answer(generation: Generation, shape: Format, request: Request, headers: Mapping[str, str]) -> Response:
    """The whole answer as JSON."""
    try:
        answers = await _while_connected(request.receive, generation.whole())
        return JSONResponse(shape.whole(answers, generation.usage()).model_dump(mode="json"), headers=dict(headers))
    except ClientGoneError:
        return Response(status_code=GONE)
    finally:
        generation.cancel()


class EventStream(StreamingResponse):
    """The answer as server-sent events. Failures before the first piece still get their own status."""

    def __init__(self, generation: Generation, shape: Format, headers: Mapping[str, str]) -> None:
        quick = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may collect the pieces
        events = _events(generation, shape)
        super().__init__(events, headers={**headers, **quick}, media_type="text/event-stream")
        self._generation, self._shape = generation, shape
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _while_connected(receive, self._send(send))
        except ClientGoneError:
            pass
        finally:
            self._generation.cancel()

    async def _send(self, send: Send) -> None:
        event = await anext(self._events)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        except ApiError as error:  # too late for a status
            event = self._shape.failure(error)
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(generation: Generation, shape: Format) -> AsyncIterator[str]:
    is_first = True
    async for index, piece in generation.pieces():
        for chunk in shape.begin(generation.request(index)) if is_first else []:
            yield shape.event(chunk)
        is_first = False
        for chunk in shape.chunks(index, piece, generation.request(index)):
            yield shape.event(chunk)
    for chunk in shape.end(generation.usage()):
        yield shape.event(chunk)
    if shape.last:
        yield shape.last


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which ends when the client goes away.

    Raises:
        ClientGoneError: it did.
    """
    job, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGoneError
        return job.result()
    finally:
        for task in (job, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

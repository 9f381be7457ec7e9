"""Answers on the wire, whole or as server-sent events; a client that goes away ends its requests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from meswitch.server.errors import ApiError
from meswitch.server.formats import Format
from meswitch.server.generation import Generation
from meswitch.server.logs import GONE

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed the connection before the answer was complete."""


async def answer(generation: Generation, shape: Format, request: Request, headers: Mapping[str, str]) -> Response:
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

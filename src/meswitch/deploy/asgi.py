"""An HTTP request to an application in this process, its answer piece by piece."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Head:
    """What comes before an answer's body."""

    status: int
    headers: list[tuple[bytes, bytes]]


async def call(app: Any, method: str, path: str, headers: Headers, body: bytes) -> AsyncIterator[Head | bytes]:
    """The head, then pieces of the body as the application sends them.

    Closing the iterator is to the application what a client's hanging up is.
    """
    pieces: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
    gone = asyncio.Event()
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            pieces.put_nowait(Head(message["status"], [(bytes(k), bytes(v)) for k, v in message["headers"]]))
        elif message.get("body"):
            pieces.put_nowait(bytes(message["body"]))

    async def run() -> None:
        try:
            await app(_scope(method, path, headers), receive, send)
        finally:
            pieces.put_nowait(None)

    running = asyncio.create_task(run())
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        await running
    finally:
        gone.set()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await running


def _scope(method: str, path: str, headers: Headers) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers),
        "client": None,
        "server": None,
    }

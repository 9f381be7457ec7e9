"""Requests as clients send them -> requests as the routes expect them; reading a body before the application does."""

import asyncio
import re
import zlib
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meswitch.server.errors import ApiError
from meswitch.server.generation import Crowds

COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
REQUESTS = Crowds(2)  # a millisecond each until the engine has them
MAX_BODY = 8 << 20  # bytes of a request, unpacked: a million tokens and more


def is_post(scope: Scope, paths: tuple[str, ...]) -> bool:
    return bool(scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in paths)


async def whole_body(receive: Receive) -> bytes | None:
    """None if the client has gone."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


def replayed(body: bytes, receive: Receive) -> Receive:
    """For the application: the body once more, then what else comes."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class NormalisingMiddleware:
    """One slash between the parts of a path and none behind it, GET for HEAD, bodies unpacked.

    Base addresses end in a slash or not, load balancers ask with HEAD, some clients send long prompts gzipped, and
    Anthropic's send their key as `x-api-key`.

    Args:
        root_path: under which a proxy serves the application. Paths may have it in front: some proxies take it away.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = re.sub("/+", "/", scope["path"])
        if self._root_path and (path + "/").startswith(self._root_path + "/"):
            path = path[len(self._root_path) :]
        path = path.rstrip("/") or "/"
        scope = {**scope, "path": path}
        scope["headers"] = with_authorization(scope["headers"])
        if scope["method"] == "HEAD":
            scope["method"], send = "GET", _without_body(send)
        try:
            scope, receive = await _unpacked(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def with_authorization(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers of a request whose key is in `authorization`, also one of Anthropic's clients."""
    named = dict(headers)
    if b"x-api-key" in named and b"authorization" not in named:
        return [*headers, (b"authorization", b"Bearer " + named[b"x-api-key"])]
    return list(headers)


def _without_body(send: Send) -> Send:
    async def head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return head


async def _unpacked(scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
    """The request with a body that is not packed any more.

    Raises:
        ApiError: it is too large, packed in a way that is not known, or damaged.
    """
    headers = Headers(scope=scope)
    length = headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_large()
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return scope, receive if length.isdigit() else await _limited(receive)
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise ApiError(415, f"Content-Encoding: {encoding!r} is not read; send the body gzipped or as it is")
    unpacker = zlib.decompressobj(wbits=47)  # gzip's header or zlib's
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":  # the client is gone
            return scope, receive
        try:
            body += unpacker.decompress(message.get("body", b""), MAX_BODY + 1 - len(body))
        except zlib.error as error:
            raise ApiError(400, f"the body is not {encoding}: {error}", code="invalid_json") from None
        if len(body) > MAX_BODY:
            raise too_large()
        more = message.get("more_body", False)
    if not unpacker.eof or unpacker.unused_data:
        raise ApiError(400, f"the body is not whole {encoding} data", code="invalid_json")
    kept = [(k, v) for k, v in scope["headers"] if k not in (b"content-encoding", b"content-length")]
    scope = {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
    return scope, replayed(bytes(body), receive)


async def _limited(receive: Receive) -> Receive:
    """Read a body whose length nobody said.

    Raises:
        ApiError: it is too large.
    """
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":  # the client is gone
            break
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise too_large()
        more = message.get("more_body", False)
    return replayed(bytes(body), receive)


def too_large() -> ApiError:
    """What a client gets whose body is larger than `MAX_BODY`."""
    return ApiError(413, f"the body is larger than {MAX_BODY >> 20} MiB", code="request_too_large")


class TurnMiddleware:
    """Requests that come at the same moment begin a few at a time. Those that ask for no answer do not wait."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            turn = asyncio.Event()
            REQUESTS.here().post(turn.set)
            await turn.wait()
        await self._app(scope, receive, send)

"""What our ASGI middlewares share: they read a request's body before the application does."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
COMPLETIONS = ("/v1/chat/completions", "/v1/completions")


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

"""vLLM's server answers as our own, where little does it: `--middleware meswitch.vllm.conformance.Conformance`.

Errors name the request's field and have the protocol's types; an id of a request that is none is replaced; what vLLM
would leave out without a word is refused. Where it still answers otherwise: docs/use/api.md.
"""

import json
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from meswitch.server.errors import ApiError
from meswitch.server.logs import REQUEST_ID, is_request_id
from meswitch.server.middleware import is_post, replayed, whole_body

_CHAT = ("/v1/chat/completions",)


class Conformance:
    """ASGI middleware inside vLLM's server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        named = REQUEST_ID.encode()
        kept = [(k, v) for k, v in scope["headers"] if k != named or is_request_id(v.decode("latin-1"))]
        scope = {**scope, "headers": kept}
        if is_post(scope, _CHAT):
            body = await whole_body(receive)
            if body is None:
                return
            if _loses_its_grammar(body):
                error = ApiError(
                    400,
                    "structured_outputs: not together with tools, beside which vLLM leaves it out; send one of them, "
                    "or tool_choice none",
                    param="structured_outputs",
                    code="unsupported_parameter",
                )
                await error.response()(scope, receive, send)
                return
            receive = replayed(body, receive)
        await self.app(scope, receive, _Errors(scope["path"], send))


def _loses_its_grammar(body: bytes) -> bool:
    """Whether a request has a grammar of its own, and tools that may be called."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):  # the latter of too many brackets
        return False
    return (
        isinstance(request, dict)
        and bool(request.get("structured_outputs"))
        and bool(request.get("tools"))
        and request.get("tool_choice") != "none"
    )


class _Errors:
    """`send` that gives errors the form of our own server; all else as it is."""

    def __init__(self, path: str, send: Send) -> None:
        self.path, self.send = path, send
        self.start: Message | None = None
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self.start = message  # its length changes with the body
            return
        if self.start is None:
            await self.send(message)
            return
        self.body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = _alike(self.path, self.start["status"], self.body)
        headers = [(name, value) for name, value in self.start.get("headers", []) if name.lower() != b"content-length"]
        await self.send({**self.start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self.send({"type": "http.response.body", "body": body})


def _alike(path: str, status: int, body: bytes) -> bytes:
    """An error's body as our own server writes it; one that is not vLLM's stays."""
    try:
        error = json.loads(body)["error"]
        message = error["message"]
    except (ValueError, KeyError, TypeError):
        return body
    if not isinstance(message, str):
        return body
    param, code = error.get("param"), error.get("code")
    param = param.removeprefix("body.") if isinstance(param, str) else None
    code = code if isinstance(code, str) else None
    if status == 404 and param == "model":
        code = "model_not_found"
    same = ApiError(status, message, param=param or None, code=code)
    return bytes(same.response(path).body)

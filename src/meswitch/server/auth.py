"""The optional API key."""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from meswitch.server.errors import ApiError

_OPEN = {"/health"}  # probes carry no key


class ApiKeyMiddleware:
    """Lets only requests with `Authorization: Bearer <key>` pass; it runs before anything reads the body."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = refusal(scope, self._key) if scope["type"] == "http" else None
        await (self._app if error is None else error.response())(scope, receive, send)


def refusal(scope: Scope, key: str) -> ApiError | None:
    """What to answer an HTTP request that lacks the key; None if it has it or needs none."""
    headers = Headers(scope=scope)
    is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers  # browsers add no key
    if not key or scope["path"] in _OPEN or is_preflight:
        return None
    scheme, _, given = headers.get("authorization", "").strip().partition(" ")
    same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())  # as long for a good guess as a bad one
    if scheme.lower() == "bearer" and same:
        return None
    return ApiError(
        401,
        "wrong or missing API key; send the header `Authorization: Bearer <key>`",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )

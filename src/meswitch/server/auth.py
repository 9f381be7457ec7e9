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
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):  # takes as long for a good guess as for a bad one
                error = ApiError(
                    401,
                    "wrong or missing API key; send the header `Authorization: Bearer <key>`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

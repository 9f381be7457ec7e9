"""`model: "auto"` in vLLM's server: `--middleware meswitch.vllm.auto.AutoRouting`.

A middleware and not an endpoint plugin: vLLM 0.25 has no such plugins, and one that is installed for all servers of an
environment is more than one family needs. It reads the family from the environment and rewrites the request's model.
"""

import json
import logging
import os
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from meswitch.errors import ConfigError
from meswitch.family import Family
from meswitch.launch import policy_from_family
from meswitch.server.auto import AUTO, Choice
from meswitch.server.errors import ApiError
from meswitch.server.middleware import COMPLETIONS, is_post, replayed, whole_body
from meswitch.vllm.command import FAMILY_VARIABLE

log = logging.getLogger("vllm.meswitch")


class AutoRouting:
    """ASGI middleware: the choice of `AutoPolicy` instead of `auto`; the answer's headers say who it is and why."""

    def __init__(self, app: Any) -> None:
        self.app = app
        path = os.environ.get(FAMILY_VARIABLE)
        if not path:
            raise ConfigError(f"{FAMILY_VARIABLE}: not set; give the family.toml whose router answers `auto`")
        self.policy, problem = policy_from_family(Family.load(path))
        if problem is not None:
            log.error("auto does not work: %s", problem)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_post(scope, COMPLETIONS):
            await self.app(scope, receive, send)
            return
        body = await whole_body(receive)
        if body is None:
            return
        request = _asked_for_auto(body)
        if request is None:
            await self.app(scope, replayed(body, receive), send)
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        try:
            choice = await self.policy.choose_for_body(request, headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        body = json.dumps({**request, "model": choice.expert}).encode()
        kept = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
        await self.app(scope, replayed(body, receive), _naming(choice, send))


def _asked_for_auto(body: bytes) -> dict[str, Any] | None:
    """The request's object; None where it names a model or is not understood, which vLLM says."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):  # the latter of too many brackets
        return None
    return request if isinstance(request, dict) and request.get("model") == AUTO else None


def _naming(choice: Choice, send: Send) -> Send:
    """`send` with headers that say who answers."""
    added = [(name.encode(), value.encode()) for name, value in choice.headers.items()]

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return named

"""`model: "auto"` in vLLM's server: `--middleware meswitch.vllm.auto.AutoRouting`.

A middleware and not an endpoint plugin: vLLM 0.25 has no such plugins, and one that is installed for all servers of an
environment is more than one family needs. It reads the family from the environment and rewrites the request's model.
"""

import json
import os
from collections.abc import Iterable
from typing import Any

from meswitch.errors import ConfigError
from meswitch.family import Family
from meswitch.launch import router_from_family
from meswitch.server.routing import Desk, with_circumstances
from meswitch.vllm.asgi import COMPLETIONS, Message, Receive, Scope, Send, is_post, replayed, whole_body
from meswitch.vllm.command import FAMILY_VARIABLE

AUTO = "auto"
HEADER = b"x-meswitch-expert"


class AutoRouting:
    """ASGI middleware: the router's choice instead of `auto`; who it is comes back in `x-meswitch-expert`."""

    def __init__(self, app: Any) -> None:
        self.app = app
        path = os.environ.get(FAMILY_VARIABLE)
        if not path:
            raise ConfigError(f"{FAMILY_VARIABLE}: not set; give the family.toml whose router answers `auto`")
        family = Family.load(path)
        self.desk = Desk(router_from_family(family), [family.base.name, *family.names], family.router.fallback)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_post(scope, COMPLETIONS):
            await self.app(scope, receive, send)
            return
        body = await whole_body(receive)
        if body is None:
            return
        expert, body = await self._routed(body, scope["headers"])
        if expert is not None:
            kept = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
            scope = {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}

        async def named(message: Message) -> None:
            if expert is not None and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (HEADER, expert.encode())]}
            await send(message)

        await self.app(scope, replayed(body, receive), named)

    async def _routed(self, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> tuple[str | None, bytes]:
        """Who answers, and the request in its name; None and as it was where it names a model or is not understood."""
        try:
            request = json.loads(body)
        except ValueError:
            return None, body  # vLLM says what is wrong
        if not isinstance(request, dict) or request.get("model") != AUTO:
            return None, body
        messages = request.get("messages")
        if not isinstance(messages, list):
            messages = [{"role": "user", "content": request.get("prompt", "")}]
        named = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        decision = await self.desk.decide(with_circumstances(messages, named, request.get("metadata")))
        return decision.expert, json.dumps({**request, "model": decision.expert}).encode()

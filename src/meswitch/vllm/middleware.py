"""Middlewares inside vLLM's server: who answers `auto`, cold experts read ahead, and answers alike our own server's.

`--middleware meswitch.vllm.middleware.Prefetch` and so on; `meswitch serve --engine vllm` gives all that are needed.
Not endpoint plugins: vLLM 0.25 has none, and one that is installed for all servers of an environment is more than one
family needs.
"""

import asyncio
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from meswitch.artifact.manifest import MANIFEST_NAME
from meswitch.errors import ConfigError
from meswitch.family import Family
from meswitch.launch import policy_from_family
from meswitch.server.auto import AUTO, Choice
from meswitch.server.errors import ApiError
from meswitch.server.logs import REQUEST_ID, is_request_id
from meswitch.server.middleware import COMPLETIONS, is_post, replayed, whole_body
from meswitch.vllm.command import DIRECTORY_VARIABLE, FAMILY_VARIABLE, LOADING

LOAD = "/v1/load_lora_adapter"
_CHAT = ("/v1/chat/completions",)
_POLL = 0.005, 0.05  # seconds between questions, at first and at last
_PATIENCE = 300.0
_TRUSTED = 2.0  # how long an expert counts as resident without asking
log = logging.getLogger("vllm.meswitch")


class AutoRouting:
    """The choice of `AutoPolicy` instead of `auto`; the answer's headers say who it is and why.

    It reads the family from the environment and rewrites the request's model.
    """

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
    request = _object(body)
    return request if request is not None and request.get("model") == AUTO else None


def _object(body: bytes) -> dict[str, Any] | None:
    """A body's JSON object; None where it is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # the latter of too many brackets
        return None
    return found if isinstance(found, dict) else None


def _naming(choice: Choice, send: Send) -> Send:
    """`send` with headers that say who answers."""
    added = [(name.encode(), value.encode()) for name, value in choice.headers.items()]

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return named


class Prefetch:
    """Cold experts are read while others decode.

    vLLM's engine loads an adapter between two steps, and every running request waits. This sees first whom a request is
    for, has the worker read that expert in the background, and lets the request through when it is ready: what the
    engine then still does is a copy. Where anything is amiss the request goes on as it is, and vLLM answers as it would
    without this.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._resident: dict[Path, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_post(scope, (*COMPLETIONS, LOAD)):
            await self.app(scope, receive, send)
            return
        body = await whole_body(receive)
        if body is None:
            return
        try:
            state = scope["app"].state
            directory = await asyncio.to_thread(self._directory, scope["path"], body, state)
            if directory is not None:
                await self._ready(directory, state.engine_client)
        except Exception as error:  # noqa: BLE001 - the request itself will say what is wrong
            log.debug("prefetch: %s", error)
        await self.app(scope, replayed(body, receive), send)

    def _directory(self, path: str, body: bytes, state: Any) -> Path | None:
        """The artifact of the expert that a request is for, None where there is none."""
        request = json.loads(body)
        name = request.get("model")
        if path == LOAD:
            found = request.get("lora_path")
        else:
            adapters = state.openai_serving_models.lora_requests
            found = adapters[name].lora_path if name in adapters else _below(os.environ.get(DIRECTORY_VARIABLE), name)
        if found is None:
            return None
        directory = Path(found).expanduser().resolve()
        return directory if (directory / MANIFEST_NAME).is_file() else None

    async def _ready(self, directory: Path, engine: Any) -> None:
        if time.monotonic() - self._resident.get(directory, -_TRUSTED) < _TRUSTED:
            return
        deadline, wait = time.monotonic() + _PATIENCE, _POLL[0]
        while time.monotonic() < deadline:
            states = await engine.collective_rpc("prefetch_delta", args=(str(directory),))
            if LOADING not in states:
                break
            await asyncio.sleep(wait)
            wait = min(2 * wait, _POLL[1])
        self._resident[directory] = time.monotonic()


def _below(directory: str | None, name: object) -> Path | None:
    """Where the resolver would look; it refuses what leads elsewhere, and so nothing there is read."""
    if not directory or not isinstance(name, str):
        return None
    root = Path(directory).expanduser().resolve()
    found = (root / name).resolve()
    return found if found.is_relative_to(root) else None


class Conformance:
    """vLLM's server answers as our own, where little does it.

    Errors name the request's field and have the protocol's types; an id of a request that is none is replaced; what
    vLLM would leave out without a word is refused. Where it still answers otherwise: docs/use/api.md.
    """

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
    request = _object(body) or {}
    return bool(request.get("structured_outputs") and request.get("tools") and request.get("tool_choice") != "none")


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

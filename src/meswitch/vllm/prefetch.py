"""Cold experts are read while others decode: `--middleware meswitch.vllm.prefetch.Prefetch`.

vLLM's engine loads an adapter between two steps, and every running request waits. This middleware of the HTTP server
sees first whom a request is for, has the worker read that expert in the background, and lets the request through when
it is ready: what the engine then still does is a copy. Where anything is amiss the request goes on as it is, and vLLM
answers as it would without the middleware.
"""

import asyncio
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from starlette.types import Receive, Scope, Send

from meswitch.artifact.manifest import MANIFEST_NAME
from meswitch.server.middleware import COMPLETIONS, is_post, replayed, whole_body
from meswitch.vllm.command import DIRECTORY_VARIABLE, LOADING

LOAD = "/v1/load_lora_adapter"
_POLL = 0.005, 0.05  # seconds between questions, at first and at last
_PATIENCE = 300.0
_TRUSTED = 2.0  # how long an expert counts as resident without asking
log = logging.getLogger("vllm.meswitch")


class Prefetch:
    """ASGI middleware inside vLLM's server."""

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

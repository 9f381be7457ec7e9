"""The endpoint: finds out who is to answer, hands a request to a replica, and to another one if that is lost."""

import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from meswitch.deploy.asgi import Head
from meswitch.deploy.replica import Refused, Routed
from meswitch.family import Family
from meswitch.launch import keys_from_family
from meswitch.server.auto import AUTO, EXPERT
from meswitch.server.errors import ApiError
from meswitch.server.keys import Keys
from meswitch.server.middleware import MAX_BODY

logger = logging.getLogger("meswitch.deploy")

ATTEMPTS = 3  # replicas that are tried
_LOST = (RayActorError, ReplicaUnavailableError)
_UNAVAILABLE = 503  # what a replica says whose engine has stopped


class Front:
    """Requests of OpenAI's protocol, as `meswitch serve` takes them.

    An answer that has not begun is asked of another replica if its own is lost; one that has begun ends with an error,
    since the client has seen a part of it.

    Args:
        replicas: of `Replica`. family: the same family.toml.
    """

    def __init__(self, replicas: DeploymentHandle, family: str) -> None:
        self._replicas = replicas
        config = Family.load(family)
        self._experts = frozenset(config.names)
        self._keys = Keys(keys_from_family(config))

    async def __call__(self, request: Request) -> Response:
        try:
            key = self._keys.check(request.scope)
            body = await _body(request)
            asked = _json(body)
            expert = str(asked.get("model", ""))
            if key is not None and expert and not key.allows(expert):
                message = f"key {key.name!r} is not for model {expert!r}"
                raise ApiError(403, message, param="model", code="model_not_allowed")
            if key is not None and request.method == "POST":
                self._keys.begin(key)
                try:
                    return _ending(await self._answered(request, asked, expert, body), lambda: self._keys.end(key))
                except BaseException:
                    self._keys.end(key)
                    raise
        except ApiError as error:
            return error.response()
        return await self._answered(request, asked, expert, body)

    async def _answered(self, request: Request, asked: dict[str, Any], expert: str, body: bytes) -> Response:
        said: dict[str, str] = {}
        if request.method == "POST" and expert == AUTO and (found := await self._route(asked, request)) is not None:
            if isinstance(found, Refused):
                return JSONResponse(found.body, found.status, found.headers)
            expert = found.expert
            said = {name: value for name, value in found.headers.items() if name != EXPERT}  # the replica says that
            body = json.dumps({**asked, "model": expert}).encode()
        return await self._passed_on(request, expert if expert in self._experts else "", body, said)

    async def _route(self, asked: dict[str, Any], request: Request) -> Routed | Refused | None:
        """Who answers `auto`; None where no replica could say."""
        for _ in range(ATTEMPTS):
            try:
                found: Routed | Refused = await self._replicas.choose.remote(asked, request.headers.items())
            except _LOST:
                logger.warning("a replica was lost while it routed; another one is asked")
            else:
                return found
        return None

    async def _passed_on(self, request: Request, expert: str, body: bytes, said: dict[str, str]) -> Response:
        handle = self._replicas.options(stream=True, method_name="answer", multiplexed_model_id=expert)
        headers = [(k, v) for k, v in request.scope["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        for attempt in range(1, ATTEMPTS + 1):
            stream = handle.remote(request.method, request.url.path, headers, body)
            try:
                head: Head = await anext(stream)
            except _LOST:
                logger.warning("a replica was lost before it answered (attempt %s of %s)", attempt, ATTEMPTS)
                continue
            if head.status == _UNAVAILABLE and request.method == "POST" and attempt < ATTEMPTS:
                logger.warning("a replica's engine has stopped (attempt %s of %s)", attempt, ATTEMPTS)
                stream.cancel()
                continue
            response = StreamingResponse(_rest(stream, _is_events(head)), status_code=head.status)
            response.raw_headers = [*head.headers, *((k.encode(), v.encode()) for k, v in said.items())]
            return response
        message = f"{ATTEMPTS} replicas were lost before one answered; ask again in a moment"
        return _lost(message, {"Retry-After": "5"}).response()


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the body is larger than {MAX_BODY >> 20} MiB", code="request_too_large")
    return bytes(body)


def _ending(response: Response, end: Callable[[], None]) -> Response:
    """A response after which `end` is called, however it ends."""
    if not isinstance(response, StreamingResponse):
        end()
        return response
    pieces = response.body_iterator

    async def ended() -> AsyncIterator[Any]:
        try:
            async for piece in pieces:
                yield piece
        finally:
            end()

    response.body_iterator = ended()
    return response


async def _rest(stream: Any, events: bool) -> AsyncIterator[bytes]:
    """The pieces of a body. A replica that is lost now ends a stream of events with one that says so."""
    try:
        async for piece in stream:
            yield piece
    except _LOST:
        logger.warning("a replica was lost in the middle of an answer")
        if not events:
            raise
        error = _lost("the replica was lost in the middle of this answer; ask again")
        yield f"data: {json.dumps(error.body())}\n\n".encode()


def _lost(message: str, headers: dict[str, str] | None = None) -> ApiError:
    return ApiError(_UNAVAILABLE, message, code="engine_unavailable", headers=headers)


def _is_events(head: Head) -> bool:
    return any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in head.headers)


def _json(body: bytes) -> dict[str, Any]:
    """A request's JSON object; empty if it is something else, which a replica then refuses."""
    try:
        asked = json.loads(body)
    except ValueError:
        return {}
    return asked if isinstance(asked, dict) else {}

"""The Ray Serve application: one `Front`, several `Replica`s, requests placed by `ExpertAware`.

The front finds out who is to answer, hands a request to a replica, and to another one if that is lost.
`serve run meswitch.deploy.ray_app:build family=/shared/family.toml replicas=2` runs it, as does a `serveConfigV2` of
KubeRay; `meswitch deploy ray` is the short way.
"""

import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from meswitch.deploy.replica import Head, Refused, Replica, Routed, ranked
from meswitch.family import Family
from meswitch.launch import keys_from_family
from meswitch.server.auto import AUTO, EXPERT
from meswitch.server.errors import ANTHROPIC_PATH, ApiError
from meswitch.server.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, Keys
from meswitch.server.middleware import COMPLETIONS, MAX_BODY, is_post, too_large, with_authorization

logger = logging.getLogger("meswitch.deploy")
ATTEMPTS = 3  # replicas that are tried
_LOST = (RayActorError, ReplicaUnavailableError)
_UNAVAILABLE = 503  # what a replica says whose engine has stopped
_CHANGES = ("/v1/experts", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_FIXED = "experts of several replicas are those of family.toml; change it and run `meswitch deploy ray` again"
_RESIDENCY_SECONDS = 1.0  # between two looks at what a replica holds


class ExpertAware(FIFOMixin, RequestRouter):
    """Requests go to a replica that holds their expert, if it has room.

    The expert is a request's `multiplexed_model_id`; what is resident is what `Replica.record_routing_stats` says.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        resident = {name: replica.routing_stats.get("resident", ()) for name, replica in by_id.items()}
        expert = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        return [[by_id[name] for name in group] for group in ranked(resident, expert)]


class Front:
    """Requests of OpenAI's protocol, as `meswitch serve` takes them.

    An answer that has not begun is asked of another replica if its own is lost; one that has begun ends with an error,
    since the client has seen a part of it.

    Args:
        replicas: of `Replica`.
        family: the same family.toml.
    """

    def __init__(self, replicas: DeploymentHandle, family: str) -> None:
        self._replicas = replicas
        config = Family.load(family)
        self._experts = frozenset(config.names)
        self._keys = Keys(keys_from_family(config))

    async def __call__(self, request: Request) -> Response:
        try:
            key = self._keys.check({**request.scope, "headers": with_authorization(request.scope["headers"])})
            if request.method != "GET" and request.url.path.startswith(_CHANGES):
                raise ApiError(501, _FIXED, code="not_supported")
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
            return error.response(request.url.path)
        return await self._answered(request, asked, expert, body)

    async def _answered(self, request: Request, asked: dict[str, Any], expert: str, body: bytes) -> Response:
        said: dict[str, str] = {}
        is_routed = is_post(request.scope, (*COMPLETIONS, ANTHROPIC_PATH)) and expert == AUTO
        if is_routed and (found := await self._route(asked, request)) is not None:
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
            raise too_large()
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


class Arguments(BaseModel):
    """What the application is built from.

    Args:
        family: path of the family.toml on every node.
        replicas: copies of the base.
        gpus: that Ray reserves for each.
        cpus: that Ray reserves for each.
        ongoing: requests that a replica takes at a time before others are asked.
        queued: that may wait for a replica, more are answered with 503.
    """

    model_config = ConfigDict(extra="forbid")

    family: Path
    replicas: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0)
    cpus: float = Field(default=1, ge=0)
    ongoing: int = Field(default=64, ge=1)
    queued: int = Field(default=1024, ge=1)


def build(arguments: Arguments) -> serve.Application:
    """The application, for `serve.run`.

    Raises:
        ConfigError: the family.toml cannot be read here.
    """
    file = str(Path(arguments.family).resolve())
    Family.load(file)  # a typing error shows before anything is started
    given = {name: key for name in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE) if (key := os.environ.get(name))}
    environment = {"env_vars": given} if given else {}
    router = RequestRouterConfig(request_router_class=ExpertAware, request_routing_stats_period_s=_RESIDENCY_SECONDS)
    replica = serve.deployment(
        Replica,
        num_replicas=arguments.replicas,
        max_ongoing_requests=arguments.ongoing,
        max_queued_requests=arguments.queued,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus, "runtime_env": environment},
        request_router_config=router,
    ).bind(file)
    front = serve.deployment(
        Front,
        max_ongoing_requests=arguments.queued,
        ray_actor_options={"num_cpus": 0, "runtime_env": environment},
    )
    return front.bind(replica, file)

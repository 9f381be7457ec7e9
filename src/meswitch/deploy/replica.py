"""One replica: an engine with its experts, and the server's application on it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from ray import serve

from meswitch.deploy.asgi import Head, Headers, call
from meswitch.family import Family
from meswitch.launch import app_from_family, engine_from_family, policy_from_family
from meswitch.server.errors import ApiError
from meswitch.server.keys import Keys

logger = logging.getLogger("meswitch.deploy")


@dataclass(frozen=True, slots=True)
class Routed:
    """Who answers, and headers that say why."""

    expert: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Refused:
    """What a client is answered that asked for what there is not: an `ApiError` that can be sent between actors."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


class Replica:
    """What Ray Serve makes of this class is one process with one copy of the base.

    Args:
        family: a family.toml that every node can read.

    Raises:
        MeswitchError: see `engine_from_family`; the deployment then says so.
    """

    def __init__(self, family: str) -> None:
        config = Family.load(family)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()
        self._engine = engine_from_family(config)
        self._auto, problem = policy_from_family(config, self._engine)
        if problem is not None:
            logger.error("auto does not work: %s", problem)
        self._app = app_from_family(config, self._engine, self._auto, Keys())  # the front asks for them

    async def choose(self, asked: dict[str, Any], headers: list[tuple[str, str]]) -> Routed | Refused:
        """Who is to answer a request for `auto`.

        Args:
            asked: the request's JSON object.
            headers: of the request.
        """
        try:
            choice = await self._auto.choose_for_body(asked, headers)
        except ApiError as error:
            return Refused(error.status, error.body(), error.headers)
        return Routed(choice.expert, choice.headers)

    async def answer(self, method: str, path: str, headers: Headers, body: bytes) -> AsyncIterator[Head | bytes]:
        """The head, with this replica's name, then the pieces of the body."""
        async for piece in call(self._app, method, path, headers, body):
            if isinstance(piece, Head):
                piece.headers.append((b"x-meswitch-replica", self._name))
            yield piece

    def record_routing_stats(self) -> dict[str, Any]:
        """The experts on the device; Ray Serve asks regularly and tells all callers."""
        return {"resident": [row.expert for row in self._engine.store.residency() if row.slot is not None]}

    def check_health(self) -> None:
        """Ray Serve replaces the replica if this raises."""
        if self._engine.failure is not None:
            raise RuntimeError(self._engine.failure)

    async def __del__(self) -> None:
        await asyncio.to_thread(self._engine.close)

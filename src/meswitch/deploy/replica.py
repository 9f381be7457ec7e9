"""One replica: an engine with its experts, and the server's application on it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from meswitch.deploy.asgi import Head, Headers, call
from meswitch.family import Family
from meswitch.launch import app_from_family, engine_from_family, router_from_family
from meswitch.server.routing import Desk, Messages


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
        self._app, problem = app_from_family(config, self._engine)
        self._desk = None
        if problem is None:
            router = router_from_family(config, self._engine)
            self._desk = Desk(router, self._engine.names, config.router.fallback)

    async def choose(self, question: Messages) -> tuple[str, dict[str, str]] | None:
        """Who is to answer a conversation, and headers that say why; None without a router."""
        if self._desk is None:
            return None
        decision = await self._desk.decide(question)
        headers: dict[str, str] = {"x-meswitch-route-reason": decision.reason}
        if decision.score is not None:
            headers["x-meswitch-route-score"] = f"{decision.score:.4f}"
        return decision.expert, headers

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

"""`model: "auto"`: the router beside the event loop. Whatever happens to it, somebody answers."""

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meswitch.router import Router
from meswitch.router.conversation import Reason

logger = logging.getLogger("meswitch.server")

Messages = Sequence[Mapping[str, Any]]

_MAX_BATCH = 64
_TIMEOUT = 30.0  # seconds; then the fallback answers


@dataclass(frozen=True, slots=True)
class Decision:
    """Who answers. score: the best expert's probability, None if the router failed."""

    expert: str
    score: float | None
    reason: Reason | Literal["failed"]


class Desk:
    """Queries that wait for the router are scored together, one batch at a time, in a thread.

    Args:
        names: who can answer. fallback: who does when the router fails.
    """

    def __init__(self, router: Router, names: Collection[str], fallback: str) -> None:
        self._router = router
        self._names = names
        self._failed = Decision(fallback, None, "failed")
        self._waiting: list[tuple[Messages, asyncio.Future[Decision]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def decide(self, messages: Messages) -> Decision:
        """Never raises because of the router."""
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._waiting.append((messages, future))
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        try:
            return await asyncio.wait_for(future, _TIMEOUT)
        except TimeoutError:
            logger.error("the router took more than %s s; %s answers", _TIMEOUT, self._failed.expert)
            return self._failed

    async def _work(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:_MAX_BATCH], self._waiting[_MAX_BATCH:]
                decisions = await asyncio.to_thread(self._route, [messages for messages, _ in batch])
                for (_, future), decision in zip(batch, decisions, strict=True):
                    if not future.done():
                        future.set_result(decision)
        finally:
            self._worker = None

    def _route(self, queries: list[Messages]) -> list[Decision]:
        try:
            routes = self._router.route_batch(queries)
            return [self._decision(route.choice, route.scores, route.reason) for route in routes]
        except Exception:
            if len(queries) > 1:  # one bad query must not take the others with it
                return [decision for query in queries for decision in self._route([query])]
            logger.exception("the router failed; %s answers", self._failed.expert)
            return [self._failed] * len(queries)

    def _decision(self, choice: str, scores: Mapping[str, float], reason: Reason) -> Decision:
        if choice not in self._names:
            logger.error("the router chose %r, which is not served; %s answers", choice, self._failed.expert)
            return self._failed
        return Decision(choice, max(scores[name] for name in self._router.experts), reason)

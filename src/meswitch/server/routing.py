"""`model: "auto"`: the router beside the event loop. Whatever happens to it, somebody answers."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meswitch.router import Request, Router
from meswitch.router.conversation import Reason
from meswitch.server.route_cache import RouteCache, key_of

logger = logging.getLogger("meswitch.server")

Messages = Sequence[Mapping[str, Any]]

ERROR = "error"  # the fallback of a family whose abstentions are errors

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
        names: who can answer. fallback: who does when the router fails. prefetch: called in a thread with each
            expert that was chosen, so that its weights travel while the prompt is encoded.
        cache_bytes: of remembered decisions; 0 remembers none.
    """

    def __init__(
        self,
        router: Router,
        names: Collection[str],
        fallback: str,
        *,
        prefetch: Callable[[str], None] | None = None,
        cache_bytes: int = 4 << 20,
    ) -> None:
        self._router = router
        self._names = names
        self._failed = Decision(fallback, None, "failed")
        self._waiting: list[tuple[Messages, asyncio.Future[Decision]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._prefetch = prefetch
        self._background: set[asyncio.Task[None]] = set()
        self._cache: RouteCache[Decision] = RouteCache(cache_bytes)
        self._decided: dict[tuple[str, str], int] = {}
        self._batches = self._scored = self._hits = 0
        self._seconds = 0.0

    async def decide(self, messages: Messages) -> Decision:
        """Never raises because of the router."""
        key = self._key(messages)
        decision = self._cache.get(key) if key else None
        if decision is not None:
            self._hits += 1
        else:
            decision = await self._ask(messages)
            if key and decision.reason != "failed":
                self._cache.put(key, decision)
        which = (decision.expert, decision.reason)
        self._decided[which] = self._decided.get(which, 0) + 1
        self._start_prefetch(decision.expert)
        return decision

    def metrics(self) -> list[str]:
        """Lines of Prometheus' text format."""
        lines = ["# TYPE meswitch_route_decisions_total counter"]
        for (expert, reason), count in sorted(self._decided.items()):
            name = expert.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
            lines.append(f'meswitch_route_decisions_total{{expert="{name}",reason="{reason}"}} {count}')
        for name, kind, value in (
            ("cache_hits_total", "counter", self._hits),
            ("batches_total", "counter", self._batches),
            ("scored_total", "counter", self._scored),
            ("seconds_total", "counter", round(self._seconds, 6)),
            ("cache_bytes", "gauge", self._cache.nbytes),
            ("waiting", "gauge", len(self._waiting)),
        ):
            lines += [f"# TYPE meswitch_route_{name} {kind}", f"meswitch_route_{name} {value}"]
        return lines

    async def _ask(self, messages: Messages) -> Decision:
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
                start = time.perf_counter()
                decisions = await asyncio.to_thread(self._route, [messages for messages, _ in batch])
                self._seconds += time.perf_counter() - start
                self._batches += 1
                self._scored += len(batch)
                for (_, future), decision in zip(batch, decisions, strict=True):
                    if not future.done():
                        future.set_result(decision)
        finally:
            self._worker = None

    def _key(self, messages: Messages) -> bytes | None:
        """What the decision depends on; None for messages that the router will refuse."""
        try:
            return key_of(self._router.inputs(messages))
        except Exception:  # noqa: BLE001 - whatever is wrong with them, the router says it
            return None

    def _start_prefetch(self, expert: str) -> None:
        if self._prefetch is None or expert not in self._names:
            return
        task = asyncio.create_task(asyncio.to_thread(self._prefetch, expert))
        self._background.add(task)  # the loop holds tasks weakly
        task.add_done_callback(self._background.discard)

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
        if choice not in self._names and not (choice == ERROR and reason == "abstained"):
            logger.error("the router chose %r, which is not served; %s answers", choice, self._failed.expert)
            return self._failed
        return Decision(choice, max(scores[name] for name in self._router.experts), reason)


def with_circumstances(messages: Messages, headers: Iterable[tuple[str, str]], metadata: Any) -> Request:
    """The conversation with what rules may look at: headers that begin with `x-`, never a key or a cookie."""
    named = {name.lower(): value for name, value in headers if name.lower().startswith("x-")}
    return Request(messages, named, metadata if isinstance(metadata, Mapping) else {})

"""`model: "auto"`: one answer to who answers, for the server, vLLM's middleware and the front of several replicas.

The router runs beside the event loop, and what it decided is remembered by what was asked. Whatever happens to it,
somebody answers.
"""

import asyncio
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote, unquote

from meswitch.errors import MeswitchError
from meswitch.router import Route, RouteOption, Router, RoutingRequest
from meswitch.router.base import Messages, Reason
from meswitch.server.errors import ApiError, without_paths
from meswitch.server.keys import CALLER
from meswitch.server.logs import RECORD

T = TypeVar("T")

ENTRY_BYTES = 512  # of a key, a decision and their places; 273 by tracemalloc, the rest is reserve
logger = logging.getLogger("meswitch.server")
AUTO = "auto"
EXPERT, ROUTE_REASON, ROUTE_SCORE = "x-meswitch-expert", "x-meswitch-route-reason", "x-meswitch-route-score"
ROUTE_SCORES = "x-meswitch-route-scores"
WANTED = EXPERT  # of a request to `auto`: who is to answer this one, whatever the router would say
ERROR = "error"  # the fallback of a family whose abstentions are errors
_MAX_BATCH = 64
_TIMEOUT = 30.0  # seconds; then the fallback answers
_TOLD = 16  # scores in a header
_NO_ROUTER = "there is none; make one with `meswitch router train` and start the server again"


class RouteCache(Generic[T]):
    """At most `budget` bytes, counting ENTRY_BYTES an entry. For one thread."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: OrderedDict[bytes, T] = OrderedDict()

    def get(self, key: bytes) -> T | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: bytes, value: T) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        while self.nbytes > self.budget:
            self._entries.popitem(last=False)

    @property
    def nbytes(self) -> int:
        return len(self._entries) * ENTRY_BYTES


def key_of(turns: Sequence[str]) -> bytes:
    """32 bytes that stand for these texts in this order; nobody can make two conversations share them."""
    digest = hashlib.sha256()
    for turn in turns:
        raw = turn.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "big"))
        digest.update(raw)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Decision:
    """Who answers.

    Args:
        expert: its name, or `error` for nobody.
        score: the best expert's probability, None if the router failed.
        scores: label -> probability.
    """

    expert: str
    score: float | None
    reason: Reason | Literal["failed"]
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """Who answers a request, and headers that say so.

    Args:
        expert: a name that is served.
        headers: of the answer.
    """

    expert: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class RouteStats:
    """What the router did so far.

    Args:
        decided: (expert, reason) -> decisions, those from the cache included.
        hits: decisions from the cache.
        batches: that were scored.
        scored: queries in them.
        seconds: that scoring took.
        cache_bytes: of remembered decisions.
        waiting: queries now.
    """

    decided: Mapping[tuple[str, str], int]
    hits: int
    batches: int
    scored: int
    seconds: float
    cache_bytes: int
    waiting: int


class AutoPolicy:
    """Who answers a request.

    Args:
        router: None without one: then only requests by name are answered.
        names: gives who can answer now.
        base: the base's name.
        fallback: who answers when the router fails; the base if it is `error`, which only means that an abstaining
            router is an error.
        no_router: why there is none, for who asks for `auto` all the same.
        prefetch: is called in a thread with each expert that was chosen.
    """

    def __init__(
        self,
        router: Router | None,
        names: Callable[[], Collection[str]],
        *,
        base: str,
        fallback: str | None = None,
        no_router: str = _NO_ROUTER,
        prefetch: Callable[[str], None] | None = None,
    ) -> None:
        failed = base if fallback in (None, ERROR) else str(fallback)
        self._queue = None if router is None else RouterQueue(router, names, failed, prefetch=prefetch)
        self._names = names
        self._learning = threading.Lock()
        self._no_router = without_paths(no_router)

    @property
    def has_router(self) -> bool:
        return self._queue is not None

    @property
    def router(self) -> Router | None:
        """Who chooses now. It is another one after `learn`, unless there was nothing to learn."""
        return None if self._queue is None else self._queue.router

    @property
    def no_router(self) -> str | None:
        """Why there is none, for clients; None if there is one."""
        return None if self.has_router else self._no_router

    @property
    def experts(self) -> tuple[str, ...]:
        """Whom the router chooses among."""
        return () if self._queue is None else self._queue.router.experts

    def learn(self, option: RouteOption) -> str | None:
        """Choose among one more expert from now on. From a thread: the router computes for that.

        Args:
            option: its name, and what is said of it.

        Returns:
            Why the router does not choose it; None if it does.
        """
        if self._queue is None:
            return self._no_router
        try:
            with self._learning:  # two that come at once must not each start from the router without the other
                self._queue.replace(self._queue.router.with_expert(option))
        except MeswitchError as error:
            return without_paths(str(error))
        return None

    async def choose(self, model: str, asked: RoutingRequest, wanted: str | None = None) -> Choice:
        """Who answers.

        Args:
            model: of the request: a name, or `auto`.
            asked: see `routing_request`. Nobody reads it where the router does not choose.
            wanted: the header `x-meswitch-expert` of the request; instead of the router's choice.

        Raises:
            ApiError: nobody of that name (404), no router (404), or nobody is for this (422).
        """
        record = RECORD.get()
        if record is not None:
            record.model = model
        if model == AUTO and wanted is not None:
            model = unquote(wanted)
        if model != AUTO:
            self.check(model)
            return Choice(model, _served_by(model))
        if self._queue is None:
            raise self.unknown(model)
        _check_allowed(model)
        decision = await self._queue.decide(asked)
        if record is not None:
            record.reason = decision.reason
        if decision.expert == ERROR:
            message = f"no expert is for this (probability {decision.score or 0:.4f} at best); name one instead of auto"
            raise ApiError(422, message, param="model", code="no_expert")
        headers = {**_served_by(decision.expert), ROUTE_REASON: decision.reason}
        if decision.score is not None:
            headers[ROUTE_SCORE] = f"{decision.score:.4f}"
            best = sorted(decision.scores.items(), key=lambda pair: -pair[1])[:_TOLD]
            headers[ROUTE_SCORES] = ",".join(f"{_header(name)}={score:.4f}" for name, score in best)
        return Choice(decision.expert, headers)

    def check(self, model: str) -> None:
        """See that somebody of this name may be asked.

        Raises:
            ApiError: nobody of that name (404), or the caller's key is not for it (403).
        """
        if model not in self._names():
            raise self.unknown(model)
        _check_allowed(model)

    async def decide(self, asked: RoutingRequest) -> Decision:
        """What the router says, without an answer.

        Raises:
            ApiError: no router (404), or the caller's key is not for `auto` (403).
        """
        if self._queue is None:
            raise self.unknown(AUTO)
        _check_allowed(AUTO)
        return await self._queue.decide(asked)

    async def choose_for_body(self, body: Mapping[str, Any], headers: Iterable[tuple[str, str]]) -> Choice:
        """As `choose`, for who has a request's JSON object and has not checked it.

        Raises:
            ApiError: see `choose`; or the router cannot read it.
        """
        named = [(name.lower(), value) for name, value in headers]
        wanted = dict(named).get(WANTED)
        model = str(body.get("model"))
        messages = [] if wanted is not None or model != AUTO else routable_messages(body)
        return await self.choose(model, routing_request(messages, named, body.get("metadata")), wanted)

    def unknown(self, model: str) -> ApiError:
        """What to answer who asked for somebody who is not there."""
        if model == AUTO:
            message = f"model {AUTO!r} needs a router: {self._no_router}"
        else:
            there = [*self._names(), *([AUTO] if self.has_router else [])]
            message = f"model {model!r} does not exist; there are {', '.join(there)}"
        return ApiError(404, message, param="model", code="model_not_found")

    def stats(self) -> RouteStats | None:
        """None without a router."""
        return None if self._queue is None else self._queue.stats()


class RouterQueue:
    """Queries that wait for the router are scored together, one batch at a time, in a thread.

    Args:
        router: chooses.
        names: gives who can answer now.
        fallback: who does when the router fails.
        prefetch: called in a thread with each expert that was chosen, so that its weights travel while the prompt is
            encoded.
        cache_bytes: of remembered decisions; 0 remembers none.
    """

    def __init__(
        self,
        router: Router,
        names: Callable[[], Collection[str]],
        fallback: str,
        *,
        prefetch: Callable[[str], None] | None = None,
        cache_bytes: int = 4 << 20,
    ) -> None:
        self.router = router
        self._names = names
        self._failed = Decision(fallback, None, "failed")
        self._waiting: list[tuple[Messages, asyncio.Future[Decision]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._prefetch = prefetch
        self._background: set[asyncio.Task[None]] = set()
        self._cache: RouteCache[Decision] = RouteCache(cache_bytes)  # what this router decided
        self._decided: dict[tuple[str, str], int] = {}
        self._batches = self._scored = self._hits = 0
        self._seconds = 0.0

    def replace(self, router: Router) -> None:
        """Ask another router from now on. From any thread."""
        self.router, self._cache = router, RouteCache(self._cache.budget)

    async def decide(self, messages: Messages) -> Decision:
        """Never raises because of the router."""
        key, cache = self._key(messages), self._cache
        decision = cache.get(key) if key else None
        if decision is not None and decision.expert not in (ERROR, *self._names()):
            decision = None  # it was served when this was remembered
        if decision is not None:
            self._hits += 1
        else:
            decision = await self._ask(messages)
            if key and decision.reason != "failed":
                cache.put(key, decision)
        which = (decision.expert, decision.reason)
        self._decided[which] = self._decided.get(which, 0) + 1
        self._start_prefetch(decision.expert)
        return decision

    def stats(self) -> RouteStats:
        return RouteStats(
            dict(self._decided),
            self._hits,
            self._batches,
            self._scored,
            self._seconds,
            self._cache.nbytes,
            len(self._waiting),
        )

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
                try:
                    decisions = await asyncio.to_thread(self._route, [messages for messages, _ in batch])
                except MeswitchError:  # its thread is gone, and the engine says so
                    decisions = [self._failed] * len(batch)
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
            return key_of(self.router.inputs(messages))
        except Exception:  # noqa: BLE001 - whatever is wrong with them, the router says it
            return None

    def _start_prefetch(self, expert: str) -> None:
        if self._prefetch is None or expert not in self._names():
            return
        task = asyncio.create_task(asyncio.to_thread(self._prefetch, expert))
        self._background.add(task)  # the loop holds tasks weakly
        task.add_done_callback(self._background.discard)

    def _route(self, queries: list[Messages]) -> list[Decision]:
        router = self.router
        try:
            return [self._decision(router, route) for route in router.route_batch(queries)]
        except Exception:
            if len(queries) > 1:  # one bad query must not take the others with it
                return [decision for query in queries for decision in self._route([query])]
            logger.exception("the router failed; %s answers", self._failed.expert)
            return [self._failed] * len(queries)

    def _decision(self, router: Router, route: Route) -> Decision:
        if route.choice not in self._names() and not (route.choice == ERROR and route.reason == "abstained"):
            logger.error("the router chose %r, which is not served; %s answers", route.choice, self._failed.expert)
            return self._failed
        best = max(route.scores[name] for name in router.experts)
        return Decision(route.choice, best, route.reason, route.scores)


def _check_allowed(model: str) -> None:
    """Raises an ApiError (403) if the caller's key is not for this model."""
    caller = CALLER.get()
    if caller is not None and not caller.allows(model):
        there = ", ".join(caller.models or ()) or "none"
        message = f"key {caller.name!r} is not for model {model!r}; it is for {there}"
        raise ApiError(403, message, param="model", code="model_not_allowed")


def routable_messages(body: Mapping[str, Any]) -> Messages:
    """What the router reads of a request's JSON object, chat or plain text.

    Raises:
        ApiError: it has no messages, or its prompt is not one text.
    """
    if "messages" in body:
        messages = body["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
            raise ApiError(400, "messages: give a list of messages", param="messages", code="invalid_value")
        return messages
    prompt = body.get("prompt")
    prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if not isinstance(prompt, str):
        message = f"prompt: model {AUTO!r} takes one text a request; name an expert for several prompts or token ids"
        raise ApiError(400, message, param="prompt", code="invalid_value")
    return [{"role": "user", "content": prompt}]


def routing_request(messages: Messages, headers: Iterable[tuple[str, str]], metadata: Any) -> RoutingRequest:
    """The conversation with what rules may look at: headers that begin with `x-`, never a key or a cookie."""
    named = {name.lower(): value for name, value in headers if name.lower().startswith("x-")}
    return RoutingRequest(messages, named, metadata if isinstance(metadata, Mapping) else {})


def _served_by(expert: str) -> dict[str, str]:
    return {EXPERT: _header(expert)}


def _header(name: str) -> str:
    return quote(name, safe=" /:@+")  # the base's name may be any text, a header may not

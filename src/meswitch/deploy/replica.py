"""One replica: an engine with its experts, and the server's application on it; and which replica answers for an expert.

A replica that holds the expert on the device is asked first, or else the expert's own first choice. The application is
called in this process (`call`), its answer taken piece by piece.
"""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meswitch.family import Family
from meswitch.launch import app_from_family, engine_from_family, experts_from_family, policy_from_family
from meswitch.server.errors import ApiError
from meswitch.server.keys import Keys

Headers = Sequence[tuple[bytes, bytes]]
logger = logging.getLogger("meswitch.deploy")


@dataclass(frozen=True, slots=True)
class Head:
    """What comes before an answer's body."""

    status: int
    headers: list[tuple[bytes, bytes]]


async def call(app: Any, method: str, path: str, headers: Headers, body: bytes) -> AsyncIterator[Head | bytes]:
    """The head, then pieces of the body as the application sends them.

    Closing the iterator is to the application what a client's hanging up is.
    """
    pieces: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
    gone = asyncio.Event()
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            pieces.put_nowait(Head(message["status"], [(bytes(k), bytes(v)) for k, v in message["headers"]]))
        elif message.get("body"):
            pieces.put_nowait(bytes(message["body"]))

    async def run() -> None:
        try:
            await app(_scope(method, path, headers), receive, send)
        finally:
            pieces.put_nowait(None)

    running = asyncio.create_task(run())
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        await running
    finally:
        gone.set()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await running


def _scope(method: str, path: str, headers: Headers) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers),
        "client": None,
        "server": None,
    }


def ranked(resident: Mapping[str, Collection[str]], expert: str) -> list[list[str]]:
    """Replicas in groups, the best first; within a group the one with the shortest queue is taken.

    Replicas that hold the expert come first. Of the others, each expert has an order of its own (rendezvous hashing,
    Thaler and Ravishankar 1998): requests that come before the first one has loaded it meet at one replica, replicas
    get different experts, and a lost replica moves only its own.

    Args:
        resident: the experts on each replica's device.
        expert: "" for a request that any replica answers as well.
    """
    if not expert:
        return [list(resident)] if resident else []
    holders = [replica for replica, experts in resident.items() if expert in experts]
    others = sorted(resident.keys() - set(holders), key=lambda replica: _weight(replica, expert))
    return [*([holders] if holders else []), *([replica] for replica in others)]


def _weight(replica: str, expert: str) -> bytes:
    return hashlib.sha256(f"{replica}\0{expert}".encode()).digest()


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
        from ray import serve  # here, so that what follows can be tried without Ray

        config = Family.load(family)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()
        self._engine = engine_from_family(config)
        self._auto, problem = policy_from_family(config, self._engine)
        if problem is not None:
            logger.error("auto does not work: %s", problem)
        experts = experts_from_family(config, self._engine)  # they are listed; the front lets nobody change them
        self._app = app_from_family(config, self._engine, self._auto, Keys(), experts)  # the front asks for keys

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

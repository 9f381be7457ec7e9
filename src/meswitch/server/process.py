"""The server's process: signals, the time that answers get at its end, reloads, TLS, and how many clients there may be.

Idle and slow connections must not keep others out.
"""

import asyncio
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from meswitch.engine import Engine
from meswitch.threads import SWITCH_SECONDS

HEAD_SECONDS = 15.0  # from the connection, or the last answer, to the last byte of a request's head
BODY_SECONDS = 120.0  # for the body
READ_SECONDS = 60.0  # without taking a byte of the answer
HEAD_BYTES = 1 << 16  # of a request's head
_LOOK_EVERY = 1.0
_RESERVED_FILES = 64  # for experts that are read, the router and logs
_FULL = json.dumps(
    {"error": {"message": "too many connections; come again", "type": "server_error", "code": "too_many_connections"}}
).encode()
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
)

logger = logging.getLogger("meswitch.server")
_LAST_WORDS = 2.0  # seconds for error events to reach their clients
_IDLE_SECONDS = 1.0  # for connections without a request to close by themselves at the end
_BACKLOG = 128  # connections that are accepted at one go, before `Connections` sees any of them


def most_connections(wanted: int) -> int:
    """What fits beside the files that are open and those that will be; raises the process's limit as far as it may.

    Args:
        wanted: connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    directory = Path("/proc/self/fd")
    used = len(os.listdir(directory)) if directory.is_dir() else _RESERVED_FILES
    needed = wanted + used + _RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(8, min(wanted, soft - used - _RESERVED_FILES))


class Connections:
    """The open connections of one server, for its event loop's thread.

    Args:
        most: of them. One more takes the place of the one that has been without a request for longest; if all have
            requests, it is refused with 503.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: set[Any] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    def protocol(self, base: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
        """uvicorn's protocol, bounded."""
        return type("BoundedProtocol", (_Bounded, base), {"bounds": self})

    def enter(self, connection: "_Bounded") -> bool:
        """Take a connection in; False if there is no room."""
        if len(self._open) >= self.most:
            idle = [one for one in self._open if one.is_idle]
            if not idle:
                return False
            victim = min(idle, key=lambda one: one.since)
            self.leave(victim)
            victim.transport.abort()
        self._open.add(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look)
        return True

    def leave(self, connection: "_Bounded") -> None:
        self._open.discard(connection)

    def abort_idle(self) -> None:
        """Cut every connection that has no request."""
        for connection in [one for one in self._open if one.is_idle]:
            connection.transport.abort()

    def abort_all(self) -> None:
        """Cut every connection that is left."""
        for connection in list(self._open):
            connection.transport.abort()

    def _look(self) -> None:
        """Cut those that are too slow."""
        loop = asyncio.get_running_loop()
        for connection in list(self._open):
            if connection.is_overdue(loop.time()):
                connection.transport.abort()
        self._timer = loop.call_later(_LOOK_EVERY, self._look) if self._open else None


class _Bounded:
    """Mixed into uvicorn's protocol: says what its connection waits for, and since when."""

    bounds: Connections
    transport: Any
    cycle: Any
    flow: Any
    loop: asyncio.AbstractEventLoop

    def connection_made(self, transport: Any) -> None:
        self.since = self.loop.time()  # it waits for a request's head, or its body
        self._head_bytes = 0
        self._unread_since: float | None = None
        super().connection_made(transport)  # type: ignore[misc]
        if not self.bounds.enter(self):
            transport.write(_REFUSAL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.bounds.leave(self)
        super().connection_lost(exc)  # type: ignore[misc]

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # refused, or cut
            return
        waited = self.is_idle
        super().data_received(data)  # type: ignore[misc]
        self._head_bytes = self._head_bytes + len(data) if waited and self.is_idle else 0
        if waited and not self.is_idle:
            self.since = self.loop.time()  # the head is there
        elif self._head_bytes > HEAD_BYTES:
            self.transport.abort()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()  # type: ignore[misc]

    @property
    def is_idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def is_overdue(self, now: float) -> bool:
        if self.transport.is_closing():
            return False
        if not self.flow.write_paused:
            self._unread_since = None
        elif self._unread_since is None:
            self._unread_since = now
        if self.is_idle:
            return now - self.since > HEAD_SECONDS
        if self.cycle.more_body:
            return now - self.since > BODY_SECONDS
        return self._unread_since is not None and now - self._unread_since > READ_SECONDS


@dataclass(frozen=True, slots=True)
class Listening:
    """How a server listens.

    Args:
        connections: at most.
        grace_seconds: that running answers get when the server is asked to stop.
        tls_cert: PEM file of the certificate and its chain.
        tls_key: PEM file of its key.
    """

    connections: int = 1024
    grace_seconds: float = 30.0
    tls_cert: Path | None = None
    tls_key: Path | None = None


class Server(uvicorn.Server):
    """uvicorn's server, whose end is in good order.

    The first SIGINT or SIGTERM: no new connections, `grace_seconds` for running answers, then the rest ends with an
    error. The second: the rest ends at once. Either way nobody is left without a last word, and the process ends with
    status 0.

    Args:
        app: the application.
        engine: answers.
        reload: is called in a thread when SIGHUP comes.
    """

    def __init__(
        self, app: FastAPI, engine: Engine, listening: Listening, *, reload: Callable[[], None] | None = None
    ) -> None:
        self.bounds = Connections(most_connections(listening.connections))
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                backlog=min(_BACKLOG, max(8, self.bounds.most // 4)),
                ssl_certfile=listening.tls_cert,
                ssl_keyfile=listening.tls_key,
                server_header=False,
            )
        )
        self._engine, self._grace, self._reload = engine, listening.grace_seconds, reload
        self._signals = 0
        self._hung_up = False
        if reload is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGHUP, self._hang_up)  # now: until there is a handler it would end the process
        self._work: set[asyncio.Future[Any]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        protocol = self.config.http_protocol_class
        self.config.http_protocol_class = self.bounds.protocol(protocol)
        sys.setswitchinterval(SWITCH_SECONDS)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # not uvicorn's, which sends itself the signal again at the end: an end in good order has status 0
        self._signals += 1
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_answers(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while self._signals < 2 and loop.time() < began + self._grace:
            await asyncio.sleep(0.05)
            if loop.time() > began + _IDLE_SECONDS:
                self.bounds.abort_idle()
        if self.server_state.tasks:
            await asyncio.to_thread(self._engine.stop, "the server was asked to stop")
            await asyncio.sleep(_LAST_WORDS)
        self.bounds.abort_all()

    async def on_tick(self, counter: int) -> bool:
        if self._hung_up:
            self._hung_up = False
            self._read_again()
        return await super().on_tick(counter)

    def _hang_up(self, sig: int, frame: FrameType | None) -> None:
        self._hung_up = True

    def _read_again(self) -> None:
        assert self._reload is not None
        work = asyncio.get_running_loop().run_in_executor(None, self._reload)
        self._work.add(work)
        work.add_done_callback(self._reloaded)

    def _reloaded(self, work: "asyncio.Future[Any]") -> None:
        self._work.discard(work)
        if not work.cancelled() and (error := work.exception()) is not None:
            logger.error("SIGHUP: %s", error)

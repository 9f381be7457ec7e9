"""The server's process: signals, the time that answers get at its end, reloads, TLS."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from meswitch.engine import Engine
from meswitch.server.connections import Connections, most_connections

logger = logging.getLogger("meswitch.server")

_LAST_WORDS = 2.0  # seconds for error events to reach their clients
_IDLE_SECONDS = 1.0  # for connections without a request to close by themselves at the end
_BACKLOG = 128  # connections that are accepted at one go, before `Connections` sees any of them


@dataclass(frozen=True, slots=True)
class Listening:
    """How a server listens.

    Args:
        connections: at most.
        grace_seconds: that running answers get when the server is asked to stop.
        tls_cert: PEM file of the certificate and its chain. tls_key: PEM file of its key.
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
        app: the application. engine: answers.
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

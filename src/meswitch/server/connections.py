"""How many clients may be connected, and how long one may take: idle and slow ones must not keep others out."""

import asyncio
import json
import os
import resource
from pathlib import Path
from typing import Any

HEAD_SECONDS = 15.0  # from the connection, or the last answer, to the last byte of a request's head
BODY_SECONDS = 120.0  # for the body
READ_SECONDS = 60.0  # without taking a byte of the answer
_LOOK_EVERY = 1.0
_RESERVED_FILES = 64  # for experts that are read, the router and logs
_FULL = json.dumps(
    {"error": {"message": "too many connections; come again", "type": "server_error", "code": "too_many_connections"}}
).encode()
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
)


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
        if waited and not self.is_idle:
            self.since = self.loop.time()  # the head is there

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

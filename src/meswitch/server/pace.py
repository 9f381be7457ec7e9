"""The event loop's share of each kind of work: what comes in crowds is done a few at a time.

A step of the engine gives hundreds of streams a piece at the same moment, and when they have ended, their clients ask
again at the same moment. Between a few of them the loop looks at everything else, such as a question to `/health`.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

from starlette.types import ASGIApp, Receive, Scope, Send


class Crowd:
    """Calls of one kind that wait for their turn in one event loop.

    Args:
        loop: makes the calls.
        at_once: calls before it looks at other things.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, at_once: int) -> None:
        self._loop, self._at_once = loop, at_once
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_woken = False

    def post(self, call: Callable[[], None]) -> None:
        """From any thread, which must survive a loop that was closed meanwhile: then nobody waits any more.

        The loop is woken once for all calls that wait.
        """
        if self._loop.is_closed():
            return
        self._waiting.append(call)
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._call)

    def _call(self) -> None:
        for _ in range(self._at_once):
            if not self._waiting:
                self._is_woken = False
                if not self._waiting:  # looked at again: whoever posted before the line above did not wake the loop
                    return
                self._is_woken = True
            self._waiting.popleft()()
        self._loop.call_soon(self._call)


class Crowds:
    """The crowd of each event loop. at_once: see `Crowd`."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._of: WeakKeyDictionary[asyncio.AbstractEventLoop, Crowd] = WeakKeyDictionary()

    def here(self) -> Crowd:
        """Of the event loop that runs."""
        loop = asyncio.get_running_loop()
        return self._of.setdefault(loop, Crowd(loop, self._at_once))


PIECES = Crowds(16)  # of answers, a tenth of a millisecond each
REQUESTS = Crowds(2)  # a millisecond each until the engine has them


class TurnMiddleware:
    """Requests that come at the same moment begin a few at a time. Those that ask for no answer do not wait."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            turn = asyncio.Event()
            REQUESTS.here().post(turn.set)
            await turn.wait()
        await self._app(scope, receive, send)

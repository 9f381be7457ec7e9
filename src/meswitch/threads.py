"""Threads that do other things than compute: pools whose ended threads show, and who sees that all get on.

Python's own pools never notice that a thread has ended, and nobody notices one that stands still: requests would wait
for ever.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from meswitch.errors import MeswitchError

logger = logging.getLogger("meswitch.engine")

# So long a thread of a server waits for another to give the interpreter away (`sys.setswitchinterval`). With Python's
# 5 ms the event loop would wait for the thread that computes again and again while a step's pieces are sent.
SWITCH_SECONDS = 0.0005
# No step takes so long: a long prompt on a CPU takes a minute, compiling a kernel two.
STALL_SECONDS = 300.0
SAID_SECONDS = 30.0  # that somebody waits for a thread's end in silence
_EVERY = 1.0


def wait_for_end(thread: threading.Thread, what: str, limit: float = STALL_SECONDS) -> bool:
    """Wait until a thread has ended: what it is doing nobody can stop. The log says so where that takes long.

    Args:
        thread: that was told to end.
        what: it does.
        limit: seconds after which nobody waits any more, and the log says that it has not ended.

    Returns:
        whether it has ended.
    """
    thread.join(min(limit, SAID_SECONDS))
    if thread.is_alive() and limit > SAID_SECONDS:
        logger.warning("closing: the thread that %s is still busy; waiting for it", what)
        thread.join(limit - SAID_SECONDS)
    if thread.is_alive():
        logger.error(
            "closed, but the thread that %s has not ended after %.0f s: what it uses is not freed, and the process may "
            "not end by itself",
            what,
            limit,
        )
    return not thread.is_alive()


class Workers(ThreadPoolExecutor):
    """A pool that knows when one of its threads has ended.

    Args:
        threads: at most.
        name: of the threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, name, initializer=self._enter)
        self._begun: list[threading.Thread] = []
        self._pending: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def are_alive(self) -> bool:
        """Whether all threads that were begun are there."""
        return all(thread.is_alive() for thread in self._begun)

    def fail(self, reason: str) -> None:
        """End what waits and runs with an error, for whoever waits for it."""
        for future in list(self._pending):
            with contextlib.suppress(InvalidStateError):  # it is done
                future.set_exception(MeswitchError(reason))

    def _enter(self) -> None:
        self._begun.append(threading.current_thread())


@dataclass(slots=True)
class Watched:
    """One thread, or some that do the same.

    Args:
        what: they do, for whoever reads that one has ended.
        alive: whether all of them are there.
        busy: whether it has something to do.
        progress: a number that changes while it gets on with that.
    """

    what: str
    alive: Callable[[], bool]
    busy: Callable[[], bool] = lambda: False
    progress: Callable[[], int] = lambda: 0
    _seen: int = -1
    _since: float = field(default=0.0)

    def problem(self, now: float, limit: float) -> str | None:
        """What is wrong with it now, if anything is."""
        if not self.alive():
            return f"the thread that {self.what} has ended"
        progress = self.progress()
        if progress != self._seen or not self.busy():
            self._seen, self._since = progress, now
        if now - self._since > limit:
            return f"the thread that {self.what} has done nothing for {now - self._since:.0f} s"
        return None


class Watchdog:
    """Looks every second, in a thread of its own.

    Args:
        watched: the threads.
        report: is told once of each problem, when it begins.
        also: is called at every look, with the clock.
        limit: seconds that a thread may be busy without progress.
    """

    def __init__(
        self,
        watched: Sequence[Watched],
        report: Callable[[str], None],
        *,
        also: Callable[[float], None] = lambda now: None,
        limit: float = STALL_SECONDS,
    ) -> None:
        self._failure: str | None = None
        self._unwell: list[Watched] = []
        self.watched = list(watched)
        """May change while it looks."""
        self._report, self._also, self._limit = report, also, limit
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meswitch-watchdog", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """What is wrong now. A thread that has ended stays so; one that goes on again is well again."""
        if not self._thread.is_alive() and not self._closed.is_set():
            return "the thread that watches the others has ended"
        return self._failure

    def look(self, now: float) -> None:
        """Look at every thread once. now: seconds of a clock that never goes back."""
        found = [(one, one.problem(now, self._limit)) for one in list(self.watched)]
        problems = [(one, problem) for one, problem in found if problem is not None]
        known, self._unwell = self._unwell, [one for one, _ in problems]
        before, self._failure = self._failure, problems[0][1] if problems else None
        for one, problem in problems:
            if not any(one is other for other in known):
                logger.error("%s", problem)
                self._report(problem)
        if self._failure is None and before is not None:
            logger.warning("the engine goes on: %s no more", before)

    def close(self) -> None:
        """End before the threads that are watched."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._closed.wait(_EVERY):
            try:
                self.look(time.monotonic())
                self._also(time.monotonic())
            except Exception:  # whatever `report` raises must not end the watch
                logger.exception("the watchdog")

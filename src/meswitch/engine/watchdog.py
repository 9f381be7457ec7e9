"""Sees that the engine's threads are alive and get on with their work, and says so when they do not."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

logger = logging.getLogger("meswitch.engine")

# No step takes so long: a long prompt on a CPU takes a minute, compiling a kernel two.
STALL_SECONDS = 300.0
_EVERY = 1.0


@dataclass(slots=True)
class Watched:
    """One thread.

    Args:
        what: it does, for whoever reads that it has ended.
        thread: the thread itself.
        busy: whether it has something to do.
        progress: a number that changes while it gets on with that.
    """

    what: str
    thread: threading.Thread
    busy: Callable[[], bool]
    progress: Callable[[], int]
    _seen: int = -1
    _since: float = field(default=0.0)

    def problem(self, now: float, limit: float) -> str | None:
        """What is wrong with it now, if anything is."""
        if not self.thread.is_alive():
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
        self.failure: str | None = None
        """What is wrong now. A thread that has ended stays so; one that goes on again is well again."""
        self._watched, self._report, self._also, self._limit = watched, report, also, limit
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meswitch-watchdog", daemon=True)
        self._thread.start()

    def look(self, now: float) -> None:
        """Look at every thread once. now: seconds of a clock that never goes back."""
        problems = [problem for one in self._watched if (problem := one.problem(now, self._limit)) is not None]
        before, self.failure = self.failure, problems[0] if problems else None
        if self.failure is not None and before is None:
            logger.error("%s", self.failure)
            self._report(self.failure)
        elif self.failure is None and before is not None:
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

"""A pool of threads that can be looked at."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any

from meswitch.errors import MeswitchError


class Workers(ThreadPoolExecutor):
    """A pool that knows when one of its threads has ended, which Python's own never notices: work would wait for ever.

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

"""What is kept in host memory: read once for all who ask, least recently used out first, counted in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from meswitch.errors import CapacityError
from meswitch.slots.loader import Loader
from meswitch.units import format_bytes

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class _Kept(Generic[V]):
    """One thing. pins: how many keep it from being thrown out."""

    future: Future[V]
    nbytes: int
    pins: int = 0


class HostTier(Generic[K, V]):
    """Experts in host memory, on their way there, or about to be.

    Both engines keep experts here: the embedded one every expert that fits, until its budget is full; vLLM's worker
    those that were read ahead and not asked for yet (afterwards they are in vLLM's own cache, by vLLM's ids).

    Never more than `budget` bytes are promised: room is taken before a read begins, and what is pinned or still being
    read is not thrown out. A read that fails leaves nothing, so that the next one who asks tries again.

    Args:
        budget: bytes; None is no limit.
        loader: its threads read.
    """

    def __init__(self, budget: int | None, loader: Loader) -> None:
        self.budget = budget
        self._loader = loader
        self._kept: OrderedDict[K, _Kept[V]] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, key: K, nbytes: int, read: Callable[[], V], *, pin: bool = False) -> Future[V] | None:
        """What is here already, is being read, or begins to be; never waits.

        Args:
            key: what it is.
            nbytes: that it takes.
            read: makes it, in a thread of the loader.
            pin: keep it until `unpin`.

        Returns:
            None while what must stay leaves no room.

        Raises:
            CapacityError: it alone is over the budget.
        """
        with self._lock:
            kept = self._kept.get(key)
            is_new = kept is None
            if kept is None:
                if self.budget is not None and nbytes > self.budget:
                    raise CapacityError(
                        f"{format_bytes(nbytes)} of host memory are needed, the budget is {format_bytes(self.budget)}; "
                        "raise engine.host_bytes"
                    )
                if not self._make_room(nbytes):
                    return None
                kept = self._kept[key] = _Kept(self._loader.start(read), nbytes)
            self._kept.move_to_end(key)
            kept.pins += pin
        if is_new:
            kept.future.add_done_callback(lambda future: self._forget(key, future))
        return kept.future

    def unpin(self, key: K) -> None:
        """Undo one `load` with `pin`."""
        with self._lock:
            if key in self._kept:
                self._kept[key].pins -= 1

    def take(self, key: K) -> Future[V] | None:
        """Hand over what is here or being read, and keep it no longer; None if there is nothing."""
        with self._lock:
            kept = self._kept.pop(key, None)
        return None if kept is None else kept.future

    def discard(self, key: K) -> None:
        """Throw out what nobody will ask for again, unless it is pinned."""
        with self._lock:
            if key in self._kept and not self._kept[key].pins:
                del self._kept[key]

    @property
    def nbytes(self) -> int:
        """Of all that is here or has room promised."""
        with self._lock:
            return sum(kept.nbytes for kept in self._kept.values())

    def resident(self) -> Mapping[K, int]:
        """Bytes of what is here, least recently used first."""
        with self._lock:
            return {key: kept.nbytes for key, kept in self._kept.items() if kept.future.done()}

    def _make_room(self, nbytes: int) -> bool:
        if self.budget is None:
            return True
        free = self.budget - sum(kept.nbytes for kept in self._kept.values())
        going = []
        for key, kept in self._kept.items():
            if free >= nbytes:
                break
            if not kept.pins and kept.future.done():
                going.append(key)
                free += kept.nbytes
        if free < nbytes:
            return False
        for key in going:
            del self._kept[key]
        return True

    def _forget(self, key: K, future: Future[V]) -> None:
        """After a read: one that failed, or was never begun, is not kept."""
        if future.cancelled() or future.exception() is not None:
            with self._lock:
                if key in self._kept and self._kept[key].future is future:
                    del self._kept[key]

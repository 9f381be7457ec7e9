"""Experts in host memory: read once for all who ask, least recently used out first, counted in bytes.

Threads of their own read (`Loader`), so that nobody else waits for a disk or a copy. Both engines use all of this.
"""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from meswitch.cpu import Workers
from meswitch.errors import (
    ArtifactError,
    CapacityError,
    IncompatibleError,
    LoadError,
    MeswitchError,
    UnknownExpertError,
)
from meswitch.units import format_bytes

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_MANY_FILES = {errno.EMFILE, errno.ENFILE}
_KINDS = {
    errno.ENOENT: "its files are not there",
    errno.EACCES: "its files may not be read",
    errno.EPERM: "its files may not be read",
    errno.ENOMEM: "there is not enough memory for it",
}


class Loader:
    """A few threads of one kind of work.

    Args:
        threads: pieces of work that are done at a time; more wait in the order in which they came.
        name: of the threads.
        device: where the slots are. On a GPU each piece of work has a stream of its own and is done when that is.
    """

    def __init__(self, threads: int, name: str, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.workers = Workers(threads, name)

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Have something done. Whatever it raises is the future's."""
        return self.workers.submit(self._do, work)

    def close(self) -> None:
        """Begin nothing more. What runs is not waited for: its disk may never answer."""
        self.workers.shutdown(wait=False, cancel_futures=True)

    def _do(self, work: Callable[[], T]) -> T:
        if self._device.type != "cuda":
            return work()
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
            done = work()
            torch.cuda.current_stream().synchronize()
            return done


def load_error(expert: str, error: BaseException) -> LoadError:
    """What whoever asked is told: the expert and the kind of fault, never a path of this machine.

    Args:
        expert: its name.
        error: what happened; it becomes the cause.
    """
    if isinstance(error, LoadError):
        return error
    found = LoadError(f"expert {expert!r} cannot be loaded: {_kind(error)}; the server's log says more")
    found.__cause__ = error
    return found


def _kind(error: BaseException) -> str:
    if isinstance(error, OSError):
        if error.errno in _MANY_FILES:
            return "too many files are open"
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        return _KINDS.get(error.errno or 0, f"its files cannot be read ({reason})")
    if isinstance(error, CapacityError):
        return "there is not enough host memory for it"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "there is not enough memory for it"
    if isinstance(error, UnknownExpertError):
        return "it was unloaded"
    if isinstance(error, IncompatibleError):
        return "it does not fit this base"
    if isinstance(error, ArtifactError):
        return "its files are missing, damaged, or were changed"
    if isinstance(error, MeswitchError):
        return "its files are damaged, cut off, or were changed"
    return f"an unexpected error ({type(error).__name__})"


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

"""Threads that load, so that nobody else has to wait for a disk or a copy; and what is said when that goes wrong."""

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from meswitch.errors import (
    ArtifactError,
    CapacityError,
    IncompatibleError,
    LoadError,
    MeswitchError,
    UnknownExpertError,
)
from meswitch.workers import Workers

T = TypeVar("T")

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

"""Reading and writing beside the encoder: the next tensors are read and the last ones written while one is encoded.

Reading, SHA-256 and writing are done without Python's lock, so one thread each is enough to take them out of the way.
"""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from meswitch.checkpoint import Checkpoint
from meswitch.tensorfile import tensor_bytes


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the expert and the base's of that name, if there is one. same: nothing changed."""

    ours: Tensor
    base: Tensor | None
    base_sha256: str | None
    same: bool


class Reader:
    """Reads tensor pairs; when one is taken, it starts on the one that is expected next.

    Args:
        pinned: into host memory from which a GPU copies fast.
    """

    def __init__(self, base: Checkpoint, expert: Checkpoint, *, pinned: bool) -> None:
        self._base, self._expert, self._pinned = base, expert, pinned
        self._after: dict[str, str] = {}
        self._ahead: tuple[str, Future[Pair]] | None = None
        self._thread = ThreadPoolExecutor(1, "reader")

    def expect(self, names: Iterable[str]) -> None:
        """Say in which order the pairs will be taken. Others may be taken as well: they are read when asked for."""
        order = list(names)
        self._after = dict(pairwise(order))
        self._drop()
        if order:
            self._ahead = order[0], self._thread.submit(self._read, order[0])

    def take(self, name: str) -> Pair:
        """A pair; what reading it raised is raised here."""
        if self._ahead is None or self._ahead[0] != name:
            self._drop()
            self._ahead = name, self._thread.submit(self._read, name)
        (_, taken), self._ahead = self._ahead, None
        if name in self._after:
            self._ahead = self._after[name], self._thread.submit(self._read, self._after[name])
        return taken.result()

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None

    def _read(self, name: str) -> Pair:
        ours = self._expert.tensors[name].read(pinned=self._pinned)
        theirs = self._base.info(name)
        if theirs is None:
            return Pair(ours, None, None, False)
        base = theirs.read(pinned=self._pinned)
        digest = hashlib.sha256(tensor_bytes(base)).hexdigest()
        return Pair(ours, base, digest, base.dtype == ours.dtype and torch.equal(base, ours))

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)


class Behind:
    """Calls a function in another thread, one call at a time and in order; an error is raised by the next call.

    Leaving the `with` block waits for the last call.
    """

    def __init__(self) -> None:
        self._last: Future[Any] | None = None
        self._thread = ThreadPoolExecutor(1, "writer")

    def call(self, function: Callable[..., None], *args: Any, **keywords: Any) -> None:
        """Wait for the call before, then start this one."""
        self.wait()
        self._last = self._thread.submit(function, *args, **keywords)

    def wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()

"""Reading an artifact by several threads: checksums take most of the time, and SHA-256 is computed without the GIL."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor

from meswitch.artifact.reader import Artifact
from meswitch.codec import Change

_THREADS = 4
_AHEAD = 8  # tensors: what is read and not asked for yet stays small


class ReadAhead:
    """An artifact whose tensors are read before they are asked for, in a `with` block.

    Args:
        names: the order in which they will be asked for. Others, and one a second time, are read when they are.
    """

    def __init__(self, artifact: Artifact, names: Iterable[str]) -> None:
        self._artifact = artifact
        self._names = iter(dict.fromkeys(names))
        self._pending: dict[str, Future[Any]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, "artifact")

    def read(self, name: str) -> Change | Tensor | None:
        """As `Artifact.read`, and raises what that raises."""
        future = self._pending.pop(name, None)
        self._fill()
        return self._artifact.read(name) if future is None else future.result()

    def _fill(self) -> None:
        while len(self._pending) < _AHEAD and (name := next(self._names, None)) is not None:
            self._pending[name] = self._threads.submit(self._artifact.read, name)

    def __enter__(self) -> "ReadAhead":
        self._fill()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)

"""Experts that are read in a thread while the engine goes on, kept until they are taken."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from meswitch.vllm.arena import Prepared

READY, LOADING, FAILED = "ready", "loading", "failed"
_MOST = 2  # that nobody took yet: each is a slot's size of host memory
Source = tuple[Path, str]  # where an artifact lies, and a digest of its manifest


class Background:
    """One thread that reads artifacts.

    Args:
        read: lays an artifact out in host memory. device: that of the slots; on a GPU the thread has its own stream.
    """

    def __init__(self, read: Callable[[Path], Prepared], device: torch.device) -> None:
        self._read, self._device = read, device
        self._known: dict[Source, Future[Prepared]] = {}
        self._thread = ThreadPoolExecutor(1, "meswitch-read")

    def start(self, source: Source) -> str:
        """Begin to read an artifact, or say how far it is. One that failed is forgotten: loading it says why."""
        future = self._known.get(source)
        if future is None:
            if len(self._known) >= _MOST:
                oldest = next(iter(self._known))
                if not self._known[oldest].done():
                    return LOADING  # ask again
                del self._known[oldest]
            self._known[source] = self._thread.submit(self._work, source[0])
            return LOADING
        if not future.done():
            return LOADING
        if future.exception() is not None:
            del self._known[source]
            return FAILED
        return READY

    def take(self, source: Source) -> Prepared | None:
        """What was read, and None if it was not begun. Raises what reading raised."""
        future = self._known.pop(source, None)
        return None if future is None else future.result()

    def _work(self, directory: Path) -> Prepared:
        if self._device.type != "cuda":
            return self._read(directory)
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
            prepared = self._read(directory)
            torch.cuda.current_stream().synchronize()
            return prepared

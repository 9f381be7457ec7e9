"""A disk that can be stopped, or made to fail, for some directories."""

import threading
from contextlib import contextmanager
from pathlib import Path

from meswitch.tensorfile import TensorInfo


class Disk:
    """Stands between the process and the tensors' bytes."""

    def __init__(self, monkeypatch) -> None:
        self._gates: dict[Path, threading.Event] = {}
        self._faults: dict[Path, BaseException] = {}
        self.reading: set[Path] = set()
        self.most_at_once = 0
        self.reads: list[Path] = []
        self._lock = threading.Lock()
        read = TensorInfo._read_into

        def slowly(info, view, start):
            directory = info.file.parent
            with self._lock:
                self.reads.append(info.file)
                self.reading.add(directory)
                self.most_at_once = max(self.most_at_once, len(self.reading))
            try:
                if directory in self._gates:
                    assert self._gates[directory].wait(60)
                if directory in self._faults:
                    raise self._faults[directory]
                read(info, view, start)
            finally:
                with self._lock:
                    self.reading.discard(directory)

        monkeypatch.setattr(TensorInfo, "_read_into", slowly)

    @contextmanager
    def stopped(self, *directories):
        """While it lasts, reads from there do not come back."""
        gates = {Path(directory): threading.Event() for directory in directories}
        self._gates |= gates
        try:
            yield
        finally:
            for directory, gate in gates.items():
                gate.set()
                del self._gates[directory]

    @contextmanager
    def failing(self, error, *directories):
        self._faults |= {Path(directory): error for directory in directories}
        try:
            yield
        finally:
            for directory in directories:
                del self._faults[Path(directory)]

"""`<out>.partial`: what an interrupted compression has done, so that the same command goes on there.

Tensors that are encoded are kept by the artifact's writer. Everything else that takes minutes has a record here: text
that the expert has written, what the model minds, the state of a training.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch import Tensor

from meswitch.artifact.writer import partial_directory
from meswitch.errors import ArtifactError, MeswitchError
from meswitch.tensorfile import read_header, read_metadata, write_tensors

SECONDS = 30.0  # of work that an interrupt may cost
SHARE = 0.05  # of the time that saving may take
_LOCK = "lock"


class SavedWork:
    """The records of one compression, in a `with` block: one process at a time.

    Args:
        out: the artifact to be.

    Raises:
        ArtifactError: another process is at it.
    """

    def __init__(self, out: Path) -> None:
        self.directory = partial_directory(out)
        self._lock: IO[str] | None = None
        self._saved_at, self._cost = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        """Whether enough was done since the last record, also against what writing that one took."""
        return time.monotonic() - self._saved_at >= max(SECONDS, self._cost / SHARE)

    def save(self, name: str, plan: str, data: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Replace a record.

        Args:
            plan: a digest of all that decides it (`digest`).
            data: of JSON.

        Raises:
            ArtifactError: it cannot be written.
        """
        started = time.monotonic()
        host = {key: tensor.detach().cpu().contiguous() for key, tensor in (tensors or {}).items()}
        try:
            write_tensors(self._file(name), host, {"plan": plan, "data": json.dumps(data)})
        except Exception as error:
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise ArtifactError(
                    f"{self._file(name)}: cannot write ({error}); free some space and run the same command again: "
                    "it goes on where it stopped"
                ) from error
            raise
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def load(self, name: str, plan: str) -> tuple[Any, dict[str, Tensor]] | None:
        """The data and tensors of a record; None if there is none of this plan."""
        file = self._file(name)
        with contextlib.suppress(MeswitchError, OSError, ValueError, KeyError):
            metadata = read_metadata(file)
            if metadata["plan"] == plan:
                return json.loads(metadata["data"]), {key: info.read() for key, info in read_header(file).items()}
        return None

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.work.safetensors"

    def __enter__(self) -> "SavedWork":
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / _LOCK).open("w")
        except OSError as error:
            raise ArtifactError(f"{error.filename}: cannot write ({error.strerror}); choose another --out") from error
        if not _locked(self._lock):
            self._lock.close()
            raise ArtifactError(f"{self.directory}: another process is compressing to it; wait for it or stop it")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.close()
        if self.directory.is_dir() and [path.name for path in self.directory.iterdir()] == [_LOCK]:
            shutil.rmtree(self.directory)  # nothing was done


class _Nowhere(SavedWork):
    """Where nothing is saved."""

    def __init__(self) -> None:
        super().__init__(Path("nowhere"))

    @property
    def due(self) -> bool:
        return False

    def save(self, name: str, plan: str, data: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        pass

    def load(self, name: str, plan: str) -> None:
        return None


NOWHERE: SavedWork = _Nowhere()


def digest(*parts: Any) -> str:
    """SHA-256 over values of JSON."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _locked(handle: IO[str]) -> bool:
    """Lock a file until it is closed or the process ends, however it does; false if another process has."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

"""Writing an artifact: in small steps that survive an interrupt, and visible only when it is complete.

All work happens in `<out>.partial`. What was added lately is kept there in small pieces, each written whole before it
gets its name, so an interrupt at any point loses seconds of work. A shard of the artifact is written from memory when
its tensors are together, and replaces their pieces. So the artifact's bytes do not depend on where a run was stopped.
At the end the directory `<out>.partial/artifact` is renamed to `<out>` in one step: a half-written artifact never has
the name of a whole one.

Tensors that are encoded are kept by `ArtifactWriter`. Everything else that takes minutes has a record in `SavedWork`:
text that the expert has written, what the model minds, the state of a training.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch import Tensor

from meswitch.artifact.manifest import (
    FORMAT,
    MANIFEST_NAME,
    VERSION,
    Entry,
    Manifest,
    Method,
    Stored,
    decoder,
    labels,
    stored_name,
)
from meswitch.artifact.reader import Artifact
from meswitch.checkpoint import sha256_file
from meswitch.codec import CodedDelta, Delta
from meswitch.durable import fsync_path, recover_directory, replace_directory, write_text
from meswitch.errors import ArtifactError, MeswitchError
from meswitch.tensorfile import NAMES, read_header, read_metadata, tensor_bytes, write_tensors

SHARD_BYTES = 256 << 20
PIECE_BYTES, PIECE_SECONDS = 64 << 20, 5.0  # what is added without being kept, at most
SAVE_SECONDS = 30.0  # of work other than encoding that an interrupt may cost
SAVE_SHARE = 0.05  # of the time that saving it may take
_SHARDS, _PIECES, _RESULT, _LOCK = "shards.json", "pieces", "artifact", "lock"


class ArtifactWriter:
    """Takes compressed tensors one by one and leaves a finished artifact at `out`.

    Args:
        out: the directory to create.
        plan: a digest of everything that decides the bytes; what an interrupted run with another plan has written is
            thrown away.
        overwrite: replace an artifact that exists.
        labels: what viewers of safetensors show of its files, such as the base's name; no reader needs it.

    Raises:
        ArtifactError: `out` exists and is not to be replaced, or is not an artifact.
    """

    def __init__(
        self, out: str | Path, plan: str, *, overwrite: bool = False, labels: Mapping[str, str] | None = None
    ) -> None:
        self.out = Path(out)
        self.partial = partial_directory(self.out)
        self._plan = plan
        self._labels = {"library": "meswitch", "artifact": f"{FORMAT} {VERSION}", **(labels or {})}
        self._shards: list[str] = []
        self.entries: dict[str, Entry] = {}  # of all tensors that were added
        self._pending: dict[str, dict[str, Tensor]] = {}  # of the shard to come: tensor -> suffix -> what is stored
        self._unkept: list[str] = []  # those of them that are in no piece
        self._pending_bytes = self._unkept_bytes = 0
        self._piece = 0
        self._kept_at = time.monotonic()
        check_destination(self.out, overwrite)
        with self._explained():
            self.result.mkdir(parents=True, exist_ok=True)
            (self.partial / _PIECES).mkdir(exist_ok=True)
            self._resume()

    @property
    def result(self) -> Path:
        """The directory that becomes the artifact."""
        return self.partial / _RESULT

    def add(self, name: str, entry: Entry, tensors: Mapping[str, Tensor]) -> None:
        """Add one tensor of the expert.

        Args:
            entry: what the manifest says of it; what is stored is filled in here.
            tensors: suffix ("" for a dense tensor) -> what is stored.
        """
        if self._pending_bytes >= SHARD_BYTES:
            self._write_shard(f"delta-{len(self._shards) + 1:05d}.safetensors")
        host = {suffix: tensor.detach().cpu().contiguous() for suffix, tensor in tensors.items()}
        parts: dict[str, Stored] = {}
        for suffix, tensor in host.items():
            raw = tensor_bytes(tensor)
            digest = hashlib.sha256(raw).hexdigest()
            parts[suffix] = Stored("", NAMES[tensor.dtype], tuple(tensor.shape), raw.nbytes, digest)
        self.entries[name] = dataclasses.replace(entry, stored=parts)
        self._pending[name] = host
        self._unkept.append(name)
        self._pending_bytes += self.entries[name].bytes
        self._unkept_bytes += self.entries[name].bytes
        if self._unkept_bytes >= PIECE_BYTES or time.monotonic() - self._kept_at >= PIECE_SECONDS:
            self.keep()

    def __enter__(self) -> "ArtifactWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:  # what was added is kept, unless that is what fails
            with contextlib.suppress(ArtifactError):
                self.keep()

    def keep(self) -> None:
        """Write what is in no piece yet into one, so that an interrupt does not lose it."""
        if self._unkept:
            self._piece += 1
            tensors = _by_stored_name({name: self._pending[name] for name in self._unkept})
            entries = {name: dataclasses.asdict(self.entries[name]) for name in self._unkept}
            path = self.partial / _PIECES / f"{self._piece:06d}.safetensors"
            with self._explained():
                write_tensors(path, tensors, {"plan": self._plan, "entries": json.dumps(entries)})
            self._unkept, self._unkept_bytes = [], 0
        self._kept_at = time.monotonic()

    def finish(self, manifest: Manifest, companions: list[Path]) -> None:
        """Write the companion files and the manifest, then give the directory its name.

        Args:
            manifest: its tensors are `final_entries()`.
        """
        with self._explained():
            for source in companions:
                shutil.copyfile(source, self.result / source.name)
                fsync_path(self.result / source.name)
            if len(self._shards) > 1:
                weights = {
                    stored_name(name, suffix): part.file
                    for name, entry in manifest.tensors.items()
                    for suffix, part in entry.stored.items()
                }
                total = sum(entry.bytes for entry in manifest.tensors.values())
                index = {"metadata": {"total_size": total}, "weight_map": weights}
                write_text(self.result / "delta.safetensors.index.json", json.dumps(index))
            write_text(self.result / MANIFEST_NAME, manifest.to_json())
            replace_directory(self.result, self.out)
            shutil.rmtree(self.partial)

    def final_entries(self) -> dict[str, Entry]:
        """All entries, once everything was added; a single shard has the plain name `delta.safetensors`."""
        if self._pending:
            plain = not self._shards
            self._write_shard("delta.safetensors" if plain else f"delta-{len(self._shards) + 1:05d}.safetensors")
        return dict(self.entries)

    def _write_shard(self, file: str) -> None:
        """Write the pending tensors as one file of the artifact; their pieces are not needed any more."""
        for name in self._pending:
            entry = self.entries[name]
            parts = {suffix: dataclasses.replace(part, file=file) for suffix, part in entry.stored.items()}
            self.entries[name] = dataclasses.replace(entry, stored=parts)
        with self._explained():
            if tensors := _by_stored_name(self._pending):
                write_tensors(self.result / file, tensors, self._labels)
                self._shards.append(file)
            self._pending, self._unkept, self._pending_bytes, self._unkept_bytes = {}, [], 0, 0
            state = {
                "plan": self._plan,
                "shards": {shard: (self.result / shard).stat().st_size for shard in self._shards},
                "entries": {name: dataclasses.asdict(entry) for name, entry in self.entries.items()},
            }
            write_text(self.partial / _SHARDS, json.dumps(state))
            for piece in (self.partial / _PIECES).iterdir():
                piece.unlink()

    def _resume(self) -> None:
        """Take over what an interrupted run with the same plan has left; throw away the rest."""
        shards = self.partial / _SHARDS
        if shards.is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError, OSError, ArtifactError):
                data = json.loads(shards.read_text())
                whole = all((self.result / file).stat().st_size == size for file, size in data["shards"].items())
                if data["plan"] == self._plan and whole:
                    self.entries = decoder(shards).decode(dict[str, Entry], data["entries"])
                    self._shards = list(data["shards"])
        for path in self.result.iterdir():
            if path.name not in self._shards:
                path.unlink()
        for piece in sorted((self.partial / _PIECES).iterdir()):
            if piece.suffix == ".tmp" or not self._resume_piece(piece):
                piece.unlink()
        self._piece = max((int(piece.stem) for piece in (self.partial / _PIECES).iterdir()), default=0)

    def _resume_piece(self, piece: Path) -> bool:
        """Whether it is whole, of this plan, and not in a shard already; then its tensors are pending again."""
        try:
            metadata, infos = read_metadata(piece), read_header(piece)
            if metadata.get("plan") != self._plan:
                return False
            entries: dict[str, Entry] = decoder(piece).decode(dict[str, Entry], json.loads(metadata["entries"]))
            if any(name in self.entries for name in entries):
                return False
            tensors = {
                name: {suffix: infos[stored_name(name, suffix)].read() for suffix in entry.stored}
                for name, entry in entries.items()
            }
        except (MeswitchError, ValueError, KeyError, OSError):
            return False
        self.entries |= entries
        self._pending |= tensors
        self._pending_bytes += sum(entry.bytes for entry in entries.values())
        return True

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ArtifactError(
                    f"{self.partial}: no space left to write ({error.strerror}); free some and run the same command "
                    "again: it goes on where it stopped"
                ) from error
            raise ArtifactError(
                f"{error.filename or self.partial}: cannot write ({error.strerror or error}); choose another --out"
            ) from error
        except Exception as error:
            # safetensors reports a failed write as its own exception, with the cause only in the text
            if type(error).__name__ == "SafetensorError":
                raise ArtifactError(
                    f"{self.partial}: cannot write ({error}); free some space and run the same command again: "
                    "it goes on where it stopped"
                ) from error
            raise


def rewrite(
    artifact: Artifact,
    out: Path,
    changed: Mapping[str, Delta | CodedDelta | Tensor],
    method: Method,
    *,
    overwrite: bool,
) -> Artifact:
    """Write `artifact` to `out` with the tensors in `changed`; shapes, dtypes and kinds stay as they are.

    Raises:
        ArtifactError: `out` exists, or cannot be written.
    """
    plan = f"{artifact.manifest.to_json()}{dataclasses.asdict(method)}"
    known = labels(artifact.manifest.base.name, artifact.manifest.expert.name, method.name)
    writer = ArtifactWriter(out, hashlib.sha256(plan.encode()).hexdigest(), overwrite=overwrite, labels=known)
    for name, entry in artifact.manifest.tensors.items():
        if name in writer.entries:
            continue
        value = changed.get(name)
        if isinstance(value, Delta | CodedDelta):
            parts = value.tensors()
        elif value is not None:
            parts = {"": value}
        else:
            parts = {suffix: artifact.read_stored(name, suffix) for suffix in entry.stored}
        writer.add(name, entry, parts)
    tensors = dict(sorted(writer.final_entries().items()))
    manifest = dataclasses.replace(artifact.manifest, tensors=tensors, method=method)
    writer.finish(manifest, [artifact.directory / name for name in artifact.manifest.companions])
    return Artifact.open(out)


def check_destination(out: Path, overwrite: bool) -> None:
    """Refuse to replace what exists, unless it is an artifact and `overwrite` says so.

    Raises:
        ArtifactError: it exists.
    """
    recover_directory(out)
    if out.exists() and not (overwrite and (out / MANIFEST_NAME).is_file()):
        fix = "use --overwrite to replace it" if (out / MANIFEST_NAME).is_file() else "choose another --out"
        raise ArtifactError(f"{out}: already exists; {fix}")


def companion_digests(paths: list[Path]) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in paths}


def partial_directory(out: Path) -> Path:
    """Where the unfinished artifact of this name is."""
    return out.with_name(out.name + ".partial")


def _by_stored_name(pending: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {stored_name(name, suffix): tensor for name, parts in pending.items() for suffix, tensor in parts.items()}


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
        return time.monotonic() - self._saved_at >= max(SAVE_SECONDS, self._cost / SAVE_SHARE)

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

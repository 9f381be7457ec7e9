"""Writing an artifact: shard by shard, resumable, and visible only when it is complete.

All work happens in `<out>.partial`. Each finished shard is flushed to the disk and entered in `progress.json`; a second
run with the same plan goes on after the last shard. At the end the directory is renamed to `<out>` in one step, so that
a half-written artifact never has the name of a whole one.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from meswitch.artifact.fingerprint import sha256_file
from meswitch.artifact.manifest import MANIFEST_NAME, Entry, Manifest, Method, Stored, decoder, stored_name
from meswitch.artifact.reader import Artifact
from meswitch.codec import CodedDelta, Delta
from meswitch.errors import ArtifactError
from meswitch.tensorfile import NAMES, fsync_path, tensor_bytes, write_tensors

SHARD_BYTES = 256 << 20
_PROGRESS = "progress.json"


class ArtifactWriter:
    """Takes compressed tensors one by one and leaves a finished artifact at `out`.

    Args:
        out: the directory to create. plan: a digest of everything that decides the bytes; a `.partial` directory with
            another plan is started over.
        overwrite: replace an artifact that exists.

    Raises:
        ArtifactError: `out` exists and is not to be replaced, or is not an artifact.
    """

    def __init__(self, out: str | Path, plan: str, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
        self.out = Path(out)
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._plan = plan
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_entries: dict[str, Entry] = {}
        self.entries: dict[str, Entry] = {}
        check_destination(self.out, overwrite)
        with self._explained():
            self.partial.mkdir(parents=True, exist_ok=True)
            self._resume()

    def _resume(self) -> None:
        progress = self.partial / _PROGRESS
        self._shards: list[str] = []
        if progress.is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError, ArtifactError):
                data = json.loads(progress.read_text())
                shards = data["shards"]
                whole = all((self.partial / s["file"]).stat().st_size == s["size"] for s in shards)
                if data["plan"] == self._plan and whole:
                    self.entries = decoder(progress).decode(dict[str, Entry], data["entries"])
                    self._shards = [s["file"] for s in shards]
        for path in self.partial.iterdir():
            if path.name not in self._shards and path.name != _PROGRESS:
                path.unlink()

    def add(self, name: str, entry: Entry, tensors: Mapping[str, Tensor]) -> None:
        """Add one tensor of the expert.

        Args:
            entry: what the manifest says of it; what is stored is filled in here.
            tensors: suffix ("" for a dense tensor) -> what is stored.
        """
        parts: dict[str, Stored] = {}
        for suffix, tensor in tensors.items():
            tensor = tensor.detach().cpu().contiguous()
            raw = tensor_bytes(tensor)
            parts[suffix] = Stored(
                file=self._shard_name(len(self._shards)),
                dtype=NAMES[tensor.dtype],
                shape=tuple(tensor.shape),
                bytes=raw.nbytes,
                sha256=hashlib.sha256(raw).hexdigest(),
            )
            self._pending[stored_name(name, suffix)] = tensor
        self._pending_entries[name] = dataclasses.replace(entry, stored=parts)
        if sum(t.nbytes for t in self._pending.values()) >= self._shard_bytes:
            self.flush()

    @staticmethod
    def _shard_name(index: int) -> str:
        return f"delta-{index + 1:05d}.safetensors"

    def flush(self) -> None:
        """Write the pending tensors as one shard and enter it in the progress file."""
        if not self._pending_entries:
            return
        with self._explained():
            if self._pending:
                path = self.partial / self._shard_name(len(self._shards))
                write_tensors(path, self._pending)
                self._shards.append(path.name)
            self.entries |= self._pending_entries
            self._pending, self._pending_entries = {}, {}
            shards = [{"file": s, "size": (self.partial / s).stat().st_size} for s in self._shards]
            state = {"plan": self._plan, "shards": shards, "entries": _plain_entries(self.entries)}
            _write_text(self.partial / _PROGRESS, json.dumps(state))

    def finish(self, manifest: Manifest, companions: list[Path]) -> None:
        """Write the companion files and the manifest, then give the directory its name."""
        self.flush()
        with self._explained():
            for source in companions:
                shutil.copyfile(source, self.partial / source.name)
                fsync_path(self.partial / source.name)
            (self.partial / _PROGRESS).unlink(missing_ok=True)
            if len(self._shards) > 1:
                weights = {
                    stored_name(name, suffix): part.file
                    for name, entry in manifest.tensors.items()
                    for suffix, part in entry.stored.items()
                }
                total = sum(entry.bytes for entry in manifest.tensors.values())
                index = {"metadata": {"total_size": total}, "weight_map": weights}
                _write_text(self.partial / "delta.safetensors.index.json", json.dumps(index))
            _write_text(self.partial / MANIFEST_NAME, manifest.to_json())
            fsync_path(self.partial)
            if self.out.exists():
                retired = self.out.with_name(self.out.name + ".replaced")
                shutil.rmtree(retired, ignore_errors=True)
                self.out.rename(retired)
                self.partial.rename(self.out)
                shutil.rmtree(retired)
            else:
                self.partial.rename(self.out)
            fsync_path(self.out.parent)

    def final_entries(self) -> dict[str, Entry]:
        """All entries after the last flush; a single shard gets its plain name `delta.safetensors`."""
        self.flush()
        if len(self._shards) != 1:
            return dict(self.entries)
        with self._explained():
            (self.partial / self._shards[0]).rename(self.partial / "delta.safetensors")
        renamed = {}
        for name, entry in self.entries.items():
            parts = {
                suffix: Stored("delta.safetensors", part.dtype, part.shape, part.bytes, part.sha256)
                for suffix, part in entry.stored.items()
            }
            renamed[name] = dataclasses.replace(entry, stored=parts)
        return renamed

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
    writer = ArtifactWriter(out, hashlib.sha256(plan.encode()).hexdigest(), overwrite=overwrite)
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
    if out.exists() and not (overwrite and (out / MANIFEST_NAME).is_file()):
        fix = "use --overwrite to replace it" if (out / MANIFEST_NAME).is_file() else "choose another --out"
        raise ArtifactError(f"{out}: already exists; {fix}")


def companion_digests(paths: list[Path]) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in paths}


def _plain_entries(entries: dict[str, Entry]) -> dict[str, Any]:
    return {name: dataclasses.asdict(entry) for name, entry in entries.items()}


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.rename(path)

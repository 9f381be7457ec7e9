"""Which version of an expert its files are now, and whether slots that were made for another version hold it.

`meswitch compress --overwrite` puts a new directory in the place of a served one. Its manifest is then another file,
which is noticed when the next request for the expert comes. Running requests keep the version that they began with.
"""

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from meswitch.artifact import Artifact, Entry
from meswitch.artifact.manifest import MANIFEST_NAME, Manifest
from meswitch.errors import ArtifactError, ConfigError, IncompatibleError, LoadError, UnknownExpertError
from meswitch.slots.layout import Layout, SlotTables
from meswitch.threads import Workers

# device, inode, bytes, time of the last change: of a manifest, all of them another's once it was replaced
Signature = tuple[int, int, int, int]

_PATIENCE = 0.05  # seconds that a request waits to learn whether its expert was replaced
_ASKING = 4  # threads that ask: storage that hangs may keep some of them
_RENAMED_WITHIN = 0.5  # seconds: between two renames a directory has no name


@dataclass(frozen=True, slots=True)
class Version:
    """One expert as it was at some time; the same for the same name and manifest.

    Args:
        expert: its name.
        digest: SHA-256 of its manifest, which has the checksum of every tensor.
        artifact: on disk, as long as it is not replaced.
        layout: of its bytes in host memory and in a slot.
        made: what the engine made of it, see `Accept`.
    """

    expert: str
    digest: str
    artifact: Artifact = field(compare=False)
    layout: Layout = field(compare=False)
    made: Any = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """The same for the same expert with the same weights, and for nothing else: to salt hashes of KV blocks."""
        return f"{self.expert}:{self.digest}"


# Told a version and what is in its place now: gives what the engine needs of that, or raises why it is not served.
Accept = Callable[[Version, Artifact], Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What slots, layers and their proof were made for.

    Args:
        forms: by tensor, the ways in which some expert stores it.
        vocabulary: tokens of the largest expert.
        tied: whether heads share their embedding; both, if some do.
        slot_bytes: of the largest expert.
        tables: of deltas that lie as the kernels read them.
    """

    forms: Mapping[str, frozenset[tuple[Any, ...]]]
    vocabulary: int
    tied: frozenset[bool]
    slot_bytes: int
    tables: SlotTables | None

    @classmethod
    def of(cls, artifacts: Iterable[Artifact], slot_bytes: int, tables: SlotTables | None) -> "Plan":
        forms: dict[str, set[tuple[Any, ...]]] = {}
        vocabulary, tied = 0, set()
        for artifact in artifacts:
            vocabulary = max(vocabulary, artifact.manifest.expert.vocab_size)
            tied.add(artifact.manifest.expert.tied_head)
            for name, entry in artifact.manifest.tensors.items():
                forms.setdefault(name, set()).add(_form(entry))
        fixed = {name: frozenset(found) for name, found in forms.items()}
        return cls(fixed, vocabulary, frozenset(tied), slot_bytes, tables)

    def check(self, artifact: Artifact, layout: Layout) -> None:
        """Refuse a version that changes what nobody planned, or takes more room. No path is in the message.

        Raises:
            IncompatibleError: naming the tensor and why.
        """
        expert = artifact.manifest.expert
        if expert.vocab_size > self.vocabulary:
            raise IncompatibleError(f"vocabulary: {expert.vocab_size} tokens, at most {self.vocabulary} were planned")
        if expert.tied_head not in self.tied:
            raise IncompatibleError(f"tied_head: {expert.tied_head}, which no expert was at the start")
        for name, entry in artifact.manifest.tensors.items():
            if name not in self.forms:
                raise IncompatibleError(f"{name}: no expert had this tensor at the start")
            if entry.kind != "same" and _form(entry) not in self.forms[name]:
                raise IncompatibleError(
                    f"{name}: {entry.kind} {list(entry.shape)}, as no expert stored it at the start"
                )
        for name, (shape, _) in layout.kernel_places().items():
            known = None if self.tables is None else self.tables.known.get(name)
            reason = "no slot has a place for it" if known is None else known.refuses(shape)
            if reason is not None:
                raise IncompatibleError(f"{name}: {reason}")
        if layout.nbytes > self.slot_bytes:
            raise IncompatibleError(f"{layout.nbytes} bytes, a slot has {self.slot_bytes}")


def _form(entry: Entry) -> tuple[Any, ...]:
    """What of an entry a layer was chosen for."""
    if entry.kind == "same":
        return ("same",)
    # of those with a delta, rows for added tokens are beside the others
    rows = entry.base_rows if entry.kind in ("packed", "lowrank") else entry.shape[:1]
    return entry.kind, entry.role, entry.shape[1:], rows


@dataclass(slots=True)
class _Known:
    """The newest version that was accepted, and the manifest file that it is known to be."""

    version: Version
    signature: Signature | None = None
    asked: Future[Signature] | None = None
    asked_at: float = field(default=0.0)


class Versions:
    """The experts' newest versions.

    Args:
        versions: those of the start.
    """

    def __init__(self, versions: Iterable[Version]) -> None:
        self._known = {version.expert: _Known(version) for version in versions}
        self._lock = threading.Lock()
        self.workers = Workers(_ASKING, "meswitch-look")
        self._lay: Callable[[Artifact], Layout] | None = None
        self._accept: Accept = lambda before, artifact: None
        self._plan: Plan | None = None

    def watch(
        self, plan: Plan, lay: Callable[[Artifact], Layout], accept: Accept | None, made: Mapping[str, Any]
    ) -> None:
        """From now on look whether files were replaced.

        Args:
            plan: what a new version must fit.
            lay: gives a new version's layout.
            accept: has the last word on it.
            made: what `accept` would have given for the versions of the start.
        """
        self._plan, self._lay = plan, lay
        self._accept = accept or self._accept
        for name, known in self._known.items():
            version = known.version
            known.version = replace(version, made=made.get(name))
            with contextlib.suppress(OSError):
                signature = _signature(version.artifact)
                if _file_digest(version.artifact) == version.digest:
                    known.signature = signature

    def add(self, name: str, artifact: Artifact, made: Any) -> Version:
        """Serve one more expert, or this instead of the one that has the name.

        Args:
            name: of the expert.
            artifact: its files, checked against the base.
            made: what `accept` would have given for it.

        Raises:
            IncompatibleError: it does not fit what slots and layers were made for.
            ConfigError: no kernel reads it.
            OSError: its manifest cannot be read any more.
        """
        assert self._plan is not None
        assert self._lay is not None
        layout = self._lay(artifact)
        self._plan.check(artifact, layout)
        signature = _signature(artifact)
        version = Version(name, manifest_digest(artifact.manifest), artifact, layout, made)
        known = _Known(version, signature if _file_digest(artifact) == version.digest else None)
        with self._lock:
            self._known = {**self._known, name: known}  # others read it without the lock
        return version

    def remove(self, name: str) -> None:
        """Know an expert no more."""
        with self._lock:
            self._known = {known: one for known, one in self._known.items() if known != name}

    def _get(self, name: str) -> _Known:
        known = self._known.get(name)
        if known is None:
            raise UnknownExpertError(f"expert {name!r} was unloaded")
        return known

    def newest(self) -> dict[str, Version]:
        return {name: known.version for name, known in self._known.items()}

    def look(self, name: str) -> Signature | None:
        """The manifest file that is there now; None if that cannot be told: gone, or storage that does not answer.

        Waits for storage no longer than `_PATIENCE`, and not at all while an earlier question is unanswered for longer.
        """
        if self._plan is None:
            return None
        known = self._get(name)
        with self._lock:
            if known.asked is None or known.asked.done():
                try:
                    known.asked = self.workers.submit(_signature, known.version.artifact)
                except RuntimeError:  # closed, or the interpreter ends
                    return None
                known.asked_at = time.monotonic()
            asked, left = known.asked, known.asked_at + _PATIENCE - time.monotonic()
        with contextlib.suppress(OSError, CancelledError):  # a timeout is an OSError
            return asked.result(max(0.0, left))
        return None

    def settled(self, name: str) -> Signature | None:
        """As `look`, for a thread that may wait: also for a directory that is just being renamed."""
        if self._plan is None:
            return None
        deadline = time.monotonic() + _RENAMED_WITHIN
        while True:
            try:
                return _signature(self._get(name).version.artifact)
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    return None
            except (OSError, UnknownExpertError):
                return None
            time.sleep(0.02)

    def current(self, name: str, signature: Signature | None) -> Version | None:
        """The version that these files are known to be, None if they have to be opened first.

        Args:
            name: of the expert.
            signature: what `look` gave; None stands for the version known last, which may be in memory still.
        """
        known = self._get(name)
        return known.version if signature is None or signature == known.signature else None

    def signature(self, name: str) -> Signature | None:
        """Of the newest version's manifest."""
        return self._get(name).signature

    def open(self, name: str) -> Version:
        """Take the files that are there now as the newest version, if they fit. Reads them, but no tensors.

        Raises:
            LoadError: they do not fit; the text says why, for everybody.
            ArtifactError: damaged, incomplete, or replaced while they were read.
            OSError: they cannot be read.
        """
        self.settled(name)
        known = self._get(name)
        before = known.version
        signature = _signature(before.artifact)
        artifact = Artifact.open(before.artifact.directory)
        digest = manifest_digest(artifact.manifest)
        if digest == before.digest:  # written again, or brought back
            version = replace(before, artifact=artifact)
        else:
            version = self._accepted(before, artifact, digest)
        if _signature(artifact) != signature:
            raise ArtifactError(f"{artifact.directory}: was replaced while it was opened; ask again")
        known.version, known.signature = version, signature
        return version

    def _accepted(self, before: Version, artifact: Artifact, digest: str) -> Version:
        assert self._plan is not None
        assert self._lay is not None
        reason = "it does not fit this base and these slots"
        try:
            layout = self._lay(artifact)
            try:
                self._plan.check(artifact, layout)
            except IncompatibleError as error:
                reason = str(error)
                raise
            made = self._accept(before, artifact)
        except (IncompatibleError, ConfigError) as error:
            raise LoadError(
                f"expert {before.expert!r} was replaced by a version that the running engine cannot serve ({reason}); "
                "restart the server for it, or put the old one back"
            ) from error
        return Version(before.expert, digest, artifact, layout, made)

    def close(self) -> None:
        self.workers.shutdown(wait=False, cancel_futures=True)


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 of a manifest as it is written."""
    return hashlib.sha256(manifest.to_json().encode()).hexdigest()


def _manifest(artifact: Artifact) -> Path:
    return artifact.directory / MANIFEST_NAME


def _file_digest(artifact: Artifact) -> str:
    return hashlib.sha256(_manifest(artifact).read_bytes()).hexdigest()


def _signature(artifact: Artifact) -> Signature:
    found = _manifest(artifact).stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

"""Residency: an expert's way from disk through host memory into a device slot, and who may go in when.

A slot is a fixed place in device memory. A request pins its expert's slot from admission to its last token; a pinned
slot is never overwritten, an unpinned one keeps its expert until another needs the place (least recently used first).
While an expert is copied into a slot nobody has that slot, so no step reads it.

Nobody waits for a load but those who need it. `request` gives a future at once; reading and copying are done by threads
of their own, and no lock is held meanwhile. An expert is read into host memory first and gets a slot only then, so that
a slow disk takes no slot from anybody. All who want one version of an expert share one load.

What is bounded:

- loads: `READERS` experts are read from disk at a time (each by a few threads, `artifact.ReadAhead`), one is copied at
  a time, and `OPENERS` manifests are read at a time; the rest waits in the order in which it was asked for;
- host memory: `host_bytes`, what is being read included. An expert that is about to be copied stays until it is;
- the device: as many slots as were made at the start.

Fairness: a request whose expert is in a slot goes in at once, past all that wait. When a waiting expert is in host
memory, and `MAX_PASSES` later requests went past it or `MAX_WAIT` seconds have gone by, one slot is promised to it: the
one with the fewest requests. That slot takes no new requests, its running ones end, and the waiting expert gets it.
Promises are made in the order in which the experts were asked for.
"""

import logging
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from meswitch.artifact import Artifact
from meswitch.errors import CapacityError, LoadError, MeswitchError, UnknownExpertError
from meswitch.pagelock import page_locked
from meswitch.slots.layout import HEAD_TIED, Layout, SlotTables
from meswitch.slots.tiers import DeviceTier, HostTier, Loader, Tensors, load_error
from meswitch.slots.versions import Accept, Plan, Signature, Version, Versions, manifest_digest
from meswitch.threads import Workers
from meswitch.units import format_bytes

logger = logging.getLogger("meswitch.slots")

READERS, OPENERS = 2, 2
MAX_PASSES = 32
MAX_WAIT = 5.0
LOAD_SECONDS = 300.0
_MAX_TRIES = 3  # of a load whose files were replaced meanwhile

_Todo = list[Callable[[], Any]]  # what is done once the lock is free


@dataclass(frozen=True, slots=True)
class Residency:
    """Where one expert's bytes are: `device`, `host` or `disk`.

    Args:
        expert: its name.
        place: of its newest version.
        bytes: that it takes in host memory and in a slot.
        slot: which, if it is in one.
        pins: requests that use it now, in any version.
        version: the newest one's key.
    """

    expert: str
    place: str
    bytes: int
    slot: int | None
    pins: int
    version: str = ""


@dataclass(slots=True)
class Counts:
    """What happened to one expert so far.

    Args:
        requests: of users for its slot (`ExpertStore.request`). hits: of them, when it was in one.
        loads: copies into a slot. evictions: times that it had to leave one. failures: loads that failed.
    """

    requests: int = 0
    hits: int = 0
    loads: int = 0
    evictions: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """A slot that is pinned until `ExpertStore.release`, and what it holds."""

    slot: int
    version: Version


@dataclass(eq=False, slots=True)
class _Load:
    """One version of an expert on its way to a slot.

    Args:
        expert: its name.
        order: when it was first asked for.
        signature: of the manifest that was there then.
        version: None until that manifest was opened.
        waiters: who wants it; nobody, if it is only fetched ahead.
        tries: how often its files were replaced on the way.
        stage: what it waits for next, or is doing.
        passed: requests that went past it, since when it has been ready for a slot.
        begun: when its files were first asked for something, None before that.
    """

    expert: str
    order: int
    signature: Signature | None
    version: Version | None
    waiters: list[Future[Held]]
    tries: int = 0
    stage: Literal["new", "opening", "reading", "ready", "copying", "failing"] = "new"
    in_host: bool = False
    passed: int = 0
    since: float | None = None
    begun: float | None = None


class ExpertStore:
    """The experts of one engine.

    Args:
        artifacts: opened artifacts by name.
        device: where the slots are.
        slots: how many.
        host_bytes: budget of the host tier, None for no limit.
        kernel: lay packed deltas out for the GPU kernels, which find them through `tables`: all, none, or those of
            these names.
        tied: names that share another tensor where an artifact does not store them.
        grows: make all slots, also those that no expert needs yet.

    Raises:
        CapacityError: less than one slot.
        ConfigError: a delta that no kernel reads.
    """

    def __init__(
        self,
        artifacts: Mapping[str, Artifact],
        *,
        device: torch.device,
        slots: int,
        host_bytes: int | None = None,
        kernel: bool | Container[str] = False,
        tied: Mapping[str, str] = HEAD_TIED,
        grows: bool = False,
    ) -> None:
        if slots < 1:
            raise CapacityError(f"slots: {slots}: an engine needs at least one slot")
        self._lay = partial(Layout.of, kernel=kernel, tied=tied)
        versions = [
            Version(name, manifest_digest(artifact.manifest), artifact, self._lay(artifact))
            for name, artifact in artifacts.items()
        ]
        self._versions = Versions(versions)
        count = slots if grows else min(slots, max(1, len(versions)))
        self._device = DeviceTier([version.layout for version in versions], device, count, kernel)
        self._openers = Loader(OPENERS, "meswitch-open")
        self._readers = Loader(READERS, "meswitch-read", device)
        self._copier = Loader(1, "meswitch-copy", device)
        self.host: HostTier[Version, Tensor] = HostTier(host_bytes, self._readers)
        self._lock = threading.Lock()
        self._loads: list[_Load] = []
        self._clock = 0
        self._closed = False
        self._counts: dict[str, Counts] = {name: Counts() for name in artifacts}
        self.load_seconds = 0.0

    def watch(self, accept: Accept | None = None, made: Mapping[str, Any] | None = None) -> None:
        """From now on notice when an expert's files are replaced: requests that come later get the new version.

        Args:
            accept: has the last word on a new version; what it gives becomes `Version.made`.
            made: what it would have given for the versions that are here.
        """
        newest = self._versions.newest().values()
        plan = Plan.of([version.artifact for version in newest], self.slot_bytes, self.tables)
        self._versions.watch(plan, self._lay, accept, made or {})
        with self._lock:
            for slot in self._device.slots:
                if slot.version is not None:
                    slot.version = self._versions.newest()[slot.version.expert]

    def add(self, name: str, artifact: Artifact, made: Any = None) -> None:
        """One more expert, or another one under a name that is known: running requests keep the one they have.

        Args:
            name: of the expert.
            artifact: of the engine's base.
            made: see `Version`.

        Raises:
            IncompatibleError: it does not fit what slots and layers were made for when the engine opened.
            MeswitchError: no kernel reads it; or its files are gone.
        """
        try:
            self._versions.add(name, artifact, made)
        except OSError as error:
            raise load_error(name, error) from error
        with self._lock:
            self._counts.setdefault(name, Counts())
            todo = self._advance()
        self._do(todo)

    def remove(self, name: str) -> None:
        """An expert less: requests that wait for it fail, running ones go on, and it leaves its slot after them.

        Raises:
            UnknownExpertError: no such expert.
        """
        self._check_known(name)
        self._versions.remove(name)
        with self._lock:
            self._device.kept -= {name}
            waiters = [waiter for load in self._loads if load.expert == name for waiter in load.waiters]
            for load in self._loads:
                if load.expert == name:
                    load.waiters = []
            self._counts.pop(name, None)
            error = UnknownExpertError(f"expert {name!r} was unloaded while this request waited for it")
            todo = [partial(_fail, waiter, error) for waiter in waiters] + self._advance()
        self._do(todo)
        for version in self.host.resident():
            if version.expert == name:
                self.host.discard(version)

    def keep(self, name: str) -> None:
        """Bring an expert to a slot, which nobody else gets until `let_go`. Returns at once.

        Raises:
            UnknownExpertError: no such expert.
            CapacityError: no slot would be left for the others.
        """
        self._check_known(name)
        with self._lock:
            kept = self._device.kept | {name}
            if len(kept) >= len(self._device.slots):
                raise CapacityError(
                    f"expert {name!r} cannot be pinned: of {len(self._device.slots)} slots {len(kept) - 1} are pinned, "
                    "and one must stay for the others; raise engine.slots"
                )
            self._device.kept = kept

        def arrived(wanted: Future[Held]) -> None:
            if not wanted.cancelled() and wanted.exception() is None:
                self.release(wanted.result().slot)

        self._wanted(name, counts=False).add_done_callback(arrived)

    def let_go(self, name: str) -> None:
        """Undo `keep`.

        Raises:
            UnknownExpertError: no such expert.
        """
        self._check_known(name)
        with self._lock:
            self._device.kept -= {name}
            todo = self._advance()
        self._do(todo)

    @property
    def kept(self) -> frozenset[str]:
        """Experts that keep their slots."""
        return self._device.kept

    @property
    def artifacts(self) -> Mapping[str, Artifact]:
        """The newest versions' artifacts by expert."""
        return {name: version.artifact for name, version in self._versions.newest().items()}

    def version(self, name: str) -> str:
        """A key that stands for the newest version of an expert that is known, and for nothing else.

        What was computed with a version may be used again only under its key: salt hashes of KV blocks with it. A
        request's own version is `Held.version.key`.

        Raises:
            UnknownExpertError: no such expert.
        """
        return self._check_known(name).key

    def tensors(self, slot: int) -> Tensors:
        """The tensors of the expert that a pinned slot holds."""
        return self._device.slots[slot].tensors

    def request(self, name: str) -> Future[Held]:
        """Ask for an expert; the future gets its slot, pinned. Cancel it, or release what it got.

        The future's callbacks run in any thread, without a lock. It fails with a `LoadError`, whose text may be shown
        to whoever asked; the next request tries again.

        Raises:
            UnknownExpertError: no such expert.
            MeswitchError: the store is closed.
        """
        return self._wanted(name, counts=True)

    def _wanted(self, name: str, *, counts: bool) -> Future[Held]:
        """As `request`. counts: whether it is a user who asks."""
        self._check_known(name)
        signature = self._versions.look(name)
        wanted: Future[Held] = Future()
        with self._lock:
            if self._closed:
                raise MeswitchError("the engine is closed")
            self._clock += 1
            if counts:
                version, done = self._versions.current(name, signature), self._counts.setdefault(name, Counts())
                done.requests += 1
                done.hits += version is not None and self._device.find(version) is not None
            todo = self._enter(name, signature, [wanted], self._clock) + self._advance()
        self._do(todo)
        wanted.add_done_callback(self._after_cancel)
        return wanted

    def prefetch(self, name: str) -> None:
        """Begin to bring an expert where it is needed soon: into host memory, and into a slot if one is unused.

        Returns at once. Nothing is said if it fails: the request itself will say what is wrong.

        Raises:
            UnknownExpertError: no such expert.
        """
        self._check_known(name)
        signature = self._versions.look(name)
        with self._lock:
            if self._closed:
                return
            self._clock += 1
            todo = self._enter(name, signature, [], self._clock) + self._advance()
        self._do(todo)

    def acquire(self, name: str, timeout: float | None = None) -> int:
        """Wait for an expert's slot, pinned. For the engine itself, such as its proof: no request is counted.

        Raises:
            UnknownExpertError: no such expert.
            CapacityError: it had none within `timeout` seconds.
            MeswitchError: what its load raised, with file and field; an OSError as it is.
        """
        wanted = self._wanted(name, counts=False)
        try:
            return wanted.result(timeout).slot
        except LoadError as error:
            raise error.__cause__ or error from None
        except TimeoutError:
            if not wanted.cancel():  # it came at the last moment
                return wanted.result().slot
            with self._lock:
                pinned = all(slot.pins for slot in self._device.slots)
            why = (
                f"all {len(self._device.slots)} slots are in use" if pinned else f"it is not loaded within {timeout} s"
            )
            raise CapacityError(f"expert {name!r}: {why}; ask again or raise engine.slots") from None

    def release(self, slot: int) -> None:
        """Give back what a request or `acquire` got, once."""
        with self._lock:
            held = self._device.slots[slot]
            if held.pins < 1:
                raise AssertionError(f"slot {slot} is released more often than acquired")
            held.pins -= 1
            todo = [] if held.pins else self._advance()
        self._do(todo)

    def end_overdue(self, now: float) -> None:
        """Fail who waits for files that have not been read within `LOAD_SECONDS`: storage that hangs may never answer.

        The read goes on, and whoever asks later fails too as long as it does.

        Args:
            now: of `time.monotonic`.
        """
        todo: _Todo = []
        with self._lock:
            for load in self._loads:
                slow = load.stage in ("opening", "reading") and load.begun is not None
                if slow and load.waiters and now - (load.begun or now) > LOAD_SECONDS:
                    why = f"its files are not read within {LOAD_SECONDS / 60:.0f} minutes"
                    error = LoadError(f"expert {load.expert!r} cannot be loaded: {why}")
                    todo += [partial(_fail, waiter, error) for waiter in load.waiters]
                    load.waiters = []
                    self._count(load.expert).failures += 1
        self._do(todo)

    def residency(self) -> list[Residency]:
        """Every expert's place and bytes."""
        host = self.host.resident()
        with self._lock:
            rows = []
            for name, version in self._versions.newest().items():
                index = self._device.find(version)
                place = "device" if index is not None else "host" if version in host else "disk"
                pins = sum(s.pins for s in self._device.slots if s.version is not None and s.version.expert == name)
                rows.append(Residency(name, place, version.layout.nbytes, index, pins, version.key))
            return rows

    def counts(self) -> dict[str, Counts]:
        """What happened to every expert so far."""
        with self._lock:
            return {name: replace(counts) for name, counts in self._counts.items()}

    @property
    def loads(self) -> int:
        """Copies into slots so far."""
        return sum(counts.loads for counts in self.counts().values())

    @property
    def evictions(self) -> int:
        """Times so far that an expert had to leave its slot."""
        return sum(counts.evictions for counts in self.counts().values())

    @property
    def failures(self) -> int:
        """Loads so far that failed."""
        return sum(counts.failures for counts in self.counts().values())

    @property
    def device_bytes(self) -> int:
        """Device memory of all slots, used or not, and of the tables that say where their deltas lie."""
        return self._device.nbytes

    @property
    def slot_bytes(self) -> int:
        """Of the largest expert."""
        return self._device.slot_bytes

    @property
    def tables(self) -> SlotTables | None:
        """Where kernels find the deltas of all slots, if they lie as kernels read them."""
        return self._device.tables

    @property
    def slot_count(self) -> int:
        return len(self._device.slots)

    @property
    def workers(self) -> dict[str, Workers]:
        """What threads do -> the threads, without which experts are not loaded."""
        return {
            "opens experts": self._openers.workers,
            "reads experts": self._readers.workers,
            "fills slots": self._copier.workers,
            "looks for new versions": self._versions.workers,
        }

    def describe(self) -> str:
        return f"{self.slot_count} slots of {format_bytes(self.slot_bytes)} for {len(self.artifacts)} experts"

    def close(self) -> None:
        """Fail what waits, and load nothing more."""
        with self._lock:
            self._closed = True
            waiters = [waiter for load in self._loads for waiter in load.waiters]
            self._loads = []
        for loader in (self._openers, self._readers, self._copier, self._versions):
            loader.close()
        for waiter in waiters:
            _fail(waiter, MeswitchError("the engine was closed"))

    def _check_known(self, name: str) -> Version:
        known = self._versions.newest()
        if name not in known:
            raise UnknownExpertError(f"no expert {name!r}; there are {', '.join(known) or 'none'}")
        return known[name]

    # Below, `todo` collects what must wait until the lock is free: whatever may call back, block or take long.

    def _do(self, todo: _Todo) -> None:
        for action in todo:
            try:
                action()
            except Exception:  # whoever asked last must not pay for another's fault
                logger.exception("an expert's load")

    def _enter(
        self,
        name: str,
        signature: Signature | None,
        waiters: list[Future[Held]],
        order: int,
        tries: int = 0,
    ) -> _Todo:
        """Let waiters in, or into the queue; the lock is held."""
        version = self._versions.current(name, signature)
        if version is not None:
            index = self._device.find(version)
            if index is not None and (not waiters or self._may_pass(index)):
                return self._grant(index, waiters)
            signature = self._versions.signature(name)
        for load in self._loads:
            same = load.version == version if version is not None else load.version is None
            if load.expert == name and same and load.signature == signature and load.stage != "failing":
                load.waiters += waiters
                return []
        self._loads.append(_Load(name, order, signature, version, waiters, tries))
        return []

    def _count(self, name: str) -> Counts:
        """Of an expert; of one that was unloaded, nobody looks at it."""
        return self._counts.get(name) or Counts()

    def _may_pass(self, index: int) -> bool:
        """Whether a request may go into a slot while others wait; promise a slot to who has waited long enough."""
        now = time.monotonic()
        for load in self._in_order():
            if load.since is None or not load.waiters or self._device.is_promised_to(load):
                continue
            load.passed += 1
            if load.passed > MAX_PASSES or now - load.since > MAX_WAIT:
                self._device.promise(load)
        return self._device.slots[index].promised is None

    def _grant(self, index: int, waiters: Sequence[Future[Held]]) -> _Todo:
        slot = self._device.slots[index]
        assert slot.ready
        assert slot.version is not None
        todo: _Todo = []
        for waiter in waiters:
            if waiter.set_running_or_notify_cancel():
                slot.pins += 1
                todo.append(partial(waiter.set_result, Held(index, slot.version)))
        if todo:
            self._clock += 1
            slot.used = self._clock
        return todo

    def _in_order(self) -> list[_Load]:
        """Those first for whom somebody waits, then in the order of asking."""
        return sorted(self._loads, key=lambda load: (not load.waiters, load.order))

    def _advance(self) -> _Todo:
        """Take every load as far as it can go now; the lock is held."""
        self._device.drop_replaced(self._versions.newest())
        todo: _Todo = []
        for load in self._in_order():
            try:
                todo += self._advance_one(load)
            except Exception as error:  # noqa: BLE001 - it must reach those who wait for this one, and nobody else
                todo.append(partial(self._failed, load, error))
                load.stage = "failing"
        return todo

    def _advance_one(self, load: _Load) -> _Todo:
        if load.expert not in self._versions.newest() and load.stage in ("new", "ready"):
            self._drop(load)
            if load.version is not None:
                self.host.discard(load.version)
            return []
        asked = bool(load.waiters)
        load.waiters = [waiter for waiter in load.waiters if not waiter.cancelled()]
        if load.stage not in ("new", "ready"):
            return []
        index = None if load.version is None else self._device.find(load.version)
        if asked and not load.waiters:
            self._drop(load)
        elif index is not None:  # somebody else brought it
            self._drop(load)
            return self._grant(index, load.waiters)
        elif load.stage == "new" and load.version is None:
            load.stage, load.begun = "opening", load.begun or time.monotonic()
            work = partial(self._versions.open, load.expert)
            return [partial(self._start, load, self._openers, work, self._opened)]
        elif load.stage == "new":
            return self._to_host(load)
        else:
            return self._to_slot(load)
        return []

    def _drop(self, load: _Load) -> None:
        """Forget a load; what it kept for itself is others' again."""
        if load in self._loads:
            self._loads.remove(load)
        self._device.withdraw(load)
        if load.in_host and load.version is not None:
            self.host.unpin(load.version)
            load.in_host = False

    def _to_host(self, load: _Load) -> _Todo:
        version = load.version
        assert version is not None
        try:
            read = partial(self._read, version)
            reading = self.host.load(version, version.layout.nbytes, read, refill=read, pin=True)
        except CapacityError as error:  # of the budget: everybody may read that
            told = LoadError(f"expert {load.expert!r}: {error}")
            raise told from CapacityError(str(told))
        if reading is not None:
            load.stage, load.in_host = "reading", True
            load.begun = load.begun or time.monotonic()
            return [partial(self._then, load, reading, self._was_read)]
        return []

    def _to_slot(self, load: _Load) -> _Todo:
        version = load.version
        assert version is not None
        if any(other.stage == "copying" and other.version == version for other in self._loads):
            return []
        index = self._device.place_for(load)
        if index is None:
            if not load.waiters:  # only fetched ahead: it is in host memory now
                self._drop(load)
            elif load.since is None:
                load.since = time.monotonic()
            return []
        slot = self._device.slots[index]
        reading = self.host.load(version, version.layout.nbytes, partial(self._read, version))
        assert reading is not None
        if slot.version is not None:
            self._count(slot.version.expert).evictions += 1
        self._device.withdraw(load)
        slot.clear()
        self._clock += 1
        slot.version, slot.used = version, self._clock
        load.stage, load.since = "copying", None
        work = partial(self._copy, index, version, reading)
        return [partial(self._start, load, self._copier, work, partial(self._was_copied, index))]

    def _start(
        self, load: _Load, loader: Loader, work: Callable[[], Any], then: Callable[[_Load, Future[Any]], _Todo]
    ) -> None:
        future: Future[Any]
        try:
            future = loader.start(work)
        except RuntimeError as error:  # the interpreter ends
            future = Future()
            future.set_exception(error)
        self._then(load, future, then)

    def _then(self, load: _Load, future: Future[Any], then: Callable[[_Load, Future[Any]], _Todo]) -> None:
        """Go on with a load once a part of its way is done. Whatever goes wrong fails this load."""

        def done(future: Future[Any]) -> None:
            try:
                if future.cancelled():
                    raise MeswitchError("the engine was closed")
                with self._lock:
                    todo = then(load, future)
            except BaseException as error:  # noqa: BLE001 - it must reach those who wait
                self._failed(load, error)
            else:
                with self._lock:
                    todo += self._advance()
                self._do(todo)

        future.add_done_callback(done)

    def _opened(self, load: _Load, future: Future[Version]) -> _Todo:
        load.version, load.stage = future.result(), "new"
        load.signature = self._versions.signature(load.expert)
        for old in self.host.resident():
            if old.expert == load.expert and old != load.version:
                self.host.discard(old)
        return []

    def _was_read(self, load: _Load, future: Future[Tensor]) -> _Todo:
        if future.exception() is not None:
            load.in_host = False  # what could not be read is not kept, so there is nothing to unpin
        future.result()
        load.stage = "ready"
        return []

    def _was_copied(self, index: int, load: _Load, future: Future[Tensors]) -> _Todo:
        slot = self._device.slots[index]
        try:
            slot.tensors = future.result()
        except BaseException:
            slot.clear()
            raise
        slot.ready = True
        self._count(load.expert).loads += 1
        todo = self._grant(index, load.waiters)
        self._drop(load)
        return todo

    def _failed(self, load: _Load, error: BaseException) -> None:
        """End a load, in a thread that may look at the disk once more."""
        load.stage = "failing"
        try:  # a thread of its own: those of the loaders may all be busy with a disk that does not answer
            threading.Thread(target=self._end, args=(load, error), name="meswitch-failed", daemon=True).start()
        except RuntimeError:  # there is none to be had
            self._end(load, error)

    def _end(self, load: _Load, error: BaseException) -> None:
        """Tell those who wait what went wrong; or try again, if the files were replaced meanwhile."""
        signature = None
        try:
            if load.tries < _MAX_TRIES and not self._closed:
                signature = self._versions.settled(load.expert)
        finally:
            with self._lock:
                self._drop(load)
                waiters = [waiter for waiter in load.waiters if not waiter.cancelled()]
                todo: _Todo = []
                if signature is not None and signature != load.signature:
                    todo += self._enter(load.expert, signature, waiters, load.order, load.tries + 1)
                else:
                    self._count(load.expert).failures += 1
                    told = load_error(load.expert, error)
                    todo += [partial(_fail, waiter, told) for waiter in waiters]
                    if not waiters:
                        logger.debug("expert %s is not fetched ahead: %s", load.expert, error)
                todo += self._advance()
            self._do(todo)

    def _after_cancel(self, wanted: Future[Held]) -> None:
        if wanted.cancelled():
            with self._lock:
                todo = self._advance()
            self._do(todo)

    def _read(self, version: Version, buffer: Tensor | None = None) -> Tensor:
        """[layout.nbytes] uint8 in host memory. In a thread of the readers.

        Args:
            buffer: of as many bytes, which nobody uses any more: locking pages takes as long as reading.
        """
        if buffer is None:
            buffer = page_locked(version.layout.nbytes, self._device.device)
        version.layout.fill(version.artifact, buffer, self._device.device)
        return buffer

    def _copy(self, index: int, version: Version, read: Future[Tensor]) -> Tensors:
        """Fill a slot that nobody has. In the copier's thread."""
        started = time.perf_counter()
        tensors = self._device.fill(index, version, read.result())
        self.load_seconds += time.perf_counter() - started
        return tensors


def _fail(waiter: Future[Held], error: Exception) -> None:
    if waiter.set_running_or_notify_cancel():
        waiter.set_exception(error)

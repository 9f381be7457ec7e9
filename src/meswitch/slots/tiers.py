"""The two places of an expert that is not on disk alone: host memory, and the slots on the device.

Host memory is read once for all who ask, least recently used out first, and counted in bytes (`HostTier`). Threads of
their own read (`Loader`), so that nobody else waits for a disk or a copy. Both engines use these.

The slots are the embedded engine's (`DeviceTier`): what is in them and who uses them. The store decides who goes in
when, and calls all of that under its lock but `fill`.
"""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from meswitch.codec import Delta, ExactDelta
from meswitch.errors import (
    ArtifactError,
    CapacityError,
    IncompatibleError,
    LoadError,
    MeswitchError,
    UnknownExpertError,
)
from meswitch.pagelock import copy
from meswitch.slots.layout import Layout, SlotTables, table_layers
from meswitch.slots.versions import Version
from meswitch.threads import Workers
from meswitch.units import format_bytes

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

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
        device: where the slots are. On a GPU each thread has a stream of its own, and work is done when that is.
    """

    def __init__(self, threads: int, name: str, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.workers = Workers(threads, name)
        self._own = threading.local()

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Have something done. Whatever it raises is the future's."""
        return self.workers.submit(self._do, work)

    def close(self) -> None:
        """Begin nothing more. What runs is not waited for: its disk may never answer."""
        self.workers.shutdown(wait=False, cancel_futures=True)

    def _do(self, work: Callable[[], T]) -> T:
        if self._device.type != "cuda":
            return work()
        # One for all that a thread does: PyTorch keeps device memory for each stream that ever used some.
        self._own.stream = stream = getattr(self._own, "stream", None) or torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            try:
                return work()
            finally:
                stream.synchronize()  # what failed may have begun a copy


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


@dataclass(slots=True)
class _Kept(Generic[V]):
    """One thing. pins: how many keep it from being thrown out."""

    future: Future[V]
    nbytes: int
    pins: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether it was read."""
        return self.future.done() and not self.future.cancelled() and self.future.exception() is None


class HostTier(Generic[K, V]):
    """Experts in host memory, on their way there, or about to be.

    Both engines keep experts here: the embedded one every expert that fits, until its budget is full; vLLM's worker
    those that were read ahead and not asked for yet (afterwards they are in vLLM's own cache, by vLLM's ids).

    Never more than `budget` bytes are promised: room is taken before a read begins, and what is pinned or still being
    read is not thrown out. A read that fails leaves nothing, so that the next one who asks tries again.

    Args:
        budget: bytes; None is no limit.
        loader: its threads read.
    """

    def __init__(self, budget: int | None, loader: Loader) -> None:
        self.budget = budget
        self._loader = loader
        self._kept: OrderedDict[K, _Kept[V]] = OrderedDict()
        self._lock = threading.Lock()

    def load(
        self,
        key: K,
        nbytes: int,
        read: Callable[[], V],
        *,
        refill: Callable[[V], V] | None = None,
        pin: bool = False,
    ) -> Future[V] | None:
        """What is here already, is being read, or begins to be; never waits.

        Args:
            key: what it is.
            nbytes: that it takes.
            read: makes it, in a thread of the loader.
            refill: makes it in place of something of as many bytes, which was thrown out for it.
            pin: keep it until `unpin`.

        Returns:
            None while what must stay leaves no room.

        Raises:
            CapacityError: it alone is over the budget.
        """
        with self._lock:
            kept = self._kept.get(key)
            is_new = kept is None
            if kept is None:
                if self.budget is not None and nbytes > self.budget:
                    raise CapacityError(
                        f"{format_bytes(nbytes)} of host memory are needed, the budget is {format_bytes(self.budget)}; "
                        "raise engine.host_bytes"
                    )
                going = self._make_room(nbytes)
                if going is None:
                    return None
                old = next((one for one in going if one.nbytes == nbytes and one.is_whole), None)
                work = read if refill is None or old is None else partial(refill, old.future.result())
                kept = self._kept[key] = _Kept(self._loader.start(work), nbytes)
            self._kept.move_to_end(key)
            kept.pins += pin
        if is_new:
            kept.future.add_done_callback(lambda future: self._forget(key, future))
        return kept.future

    def unpin(self, key: K) -> None:
        """Undo one `load` with `pin`."""
        with self._lock:
            if key in self._kept:
                self._kept[key].pins -= 1

    def take(self, key: K) -> Future[V] | None:
        """Hand over what is here or being read, and keep it no longer; None if there is nothing."""
        with self._lock:
            kept = self._kept.pop(key, None)
        return None if kept is None else kept.future

    def discard(self, key: K) -> None:
        """Throw out what nobody will ask for again, unless it is pinned."""
        with self._lock:
            if key in self._kept and not self._kept[key].pins:
                del self._kept[key]

    @property
    def nbytes(self) -> int:
        """Of all that is here or has room promised."""
        with self._lock:
            return sum(kept.nbytes for kept in self._kept.values())

    def resident(self) -> Mapping[K, int]:
        """Bytes of what is here, least recently used first."""
        with self._lock:
            return {key: kept.nbytes for key, kept in self._kept.items() if kept.future.done()}

    def _make_room(self, nbytes: int) -> list[_Kept[V]] | None:
        """Throw out what is used least; gives that, or None if it would not be enough."""
        if self.budget is None:
            return []
        free = self.budget - sum(kept.nbytes for kept in self._kept.values())
        going = []
        for key, kept in self._kept.items():
            if free >= nbytes:
                break
            if not kept.pins and kept.future.done():
                going.append(key)
                free += kept.nbytes
        return None if free < nbytes else [self._kept.pop(key) for key in going]

    def _forget(self, key: K, future: Future[V]) -> None:
        """After a read: one that failed, or was never begun, is not kept."""
        if future.cancelled() or future.exception() is not None:
            with self._lock:
                if key in self._kept and self._kept[key].future is future:
                    del self._kept[key]


# An expert's tensors by their stored names; what it shares with the base is not there.
Tensors = Mapping[str, Delta | ExactDelta | Tensor]


@dataclass(eq=False, slots=True)
class Slot:
    """A place on the device.

    Args:
        buffer: [slot_bytes] uint8.
        version: what is there or is being copied there; None while it is empty.
        ready: whether it is copied.
        pins: requests that use it.
        used: clock of the last request.
        tensors: views of the buffer.
        promised: to whom, once nobody uses it; it takes no new requests then.
    """

    buffer: Tensor
    version: Version | None = None
    ready: bool = False
    pins: int = 0
    used: int = 0
    tensors: Tensors = field(default_factory=dict)
    promised: object | None = None

    def clear(self) -> None:
        """Nothing is found there any more."""
        self.version, self.ready, self.tensors = None, False, {}


class DeviceTier:
    """All slots, in one allocation.

    Args:
        layouts: of all experts; a slot holds the largest.
        device: where they are.
        count: how many.
        kernel: see `ExpertStore`.

    Raises:
        ConfigError: experts whose deltas of one tensor no kernel reads together.
    """

    def __init__(
        self, layouts: Sequence[Layout], device: torch.device, count: int, kernel: bool | Container[str]
    ) -> None:
        self.device = device
        self.slot_bytes = max((layout.nbytes for layout in layouts), default=0)
        self._arena = torch.zeros(count, self.slot_bytes, dtype=torch.uint8, device=device)
        self.slots = [Slot(self._arena[i]) for i in range(count)]
        self.kept: frozenset[str] = frozenset()
        """Experts whose slots nobody else gets."""
        self.tables: SlotTables | None = None
        if kernel is not False:
            shapes = [(name, shape) for layout in layouts for name, (shape, _) in layout.kernel_places().items()]
            self.tables = SlotTables(self._arena.view(-1), count, table_layers(shapes))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams write there from now on

    @property
    def nbytes(self) -> int:
        """Of all slots, used or not, and of the tables that say where their deltas lie."""
        return self._arena.numel() + (0 if self.tables is None else self.tables.nbytes)

    def find(self, version: Version) -> int | None:
        """A slot that this version is in and that takes requests."""
        for index, slot in enumerate(self.slots):
            if slot.ready and slot.promised is None and slot.version == version:
                return index
        return None

    def place_for(self, who: object) -> int | None:
        """The slot to put something in: the one that was promised, an empty one, or the least recently used."""
        usable = [
            index
            for index, slot in enumerate(self.slots)
            if not slot.pins
            and (slot.ready or slot.version is None)
            and slot.promised in (None, who)
            and not self._is_kept(slot)
        ]
        if not usable:
            return None

        def order(index: int) -> tuple[bool, bool, int]:
            slot = self.slots[index]
            return slot.promised is not who, slot.version is not None, slot.used

        return min(usable, key=order)

    def promise(self, who: object) -> None:
        """Keep the slot with the fewest requests for somebody, unless one is kept already."""
        free = [slot for slot in self.slots if slot.ready and slot.promised is None and not self._is_kept(slot)]
        if free and not any(slot.promised is who for slot in self.slots):
            min(free, key=lambda slot: (slot.pins, slot.used)).promised = who

    def _is_kept(self, slot: Slot) -> bool:
        return slot.version is not None and slot.version.expert in self.kept

    def withdraw(self, who: object) -> None:
        """Give a promised slot back to all."""
        for slot in self.slots:
            if slot.promised is who:
                slot.promised = None

    def is_promised_to(self, who: object) -> bool:
        return any(slot.promised is who for slot in self.slots)

    def drop_replaced(self, newest: Mapping[str, Version]) -> None:
        """Empty the slots of versions that were replaced or unloaded and that no request uses."""
        for slot in self.slots:
            version = slot.version
            if slot.ready and not slot.pins and version is not None and version != newest.get(version.expert):
                slot.clear()

    def fill(self, index: int, version: Version, source: Tensor) -> Tensors:
        """Copy an expert into a slot that nobody has. In the copier's thread, beside the computing stream.

        Args:
            index: of the slot.
            version: what it is.
            source: [layout.nbytes] uint8, page-locked for a GPU.

        Returns:
            its tensors, views of the slot.
        """
        layout, buffer = version.layout, self.slots[index].buffer
        copy(buffer[: layout.nbytes], source, non_blocking=True)
        if self.tables is not None:
            first = index * self.slot_bytes
            places = {name: (shape, first + offset) for name, (shape, offset) in layout.kernel_places().items()}
            self.tables.point(index, places)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return layout.views(buffer)

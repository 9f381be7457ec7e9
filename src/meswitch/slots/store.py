"""Residency: an expert's way from disk through host memory into a device slot.

A slot is a fixed place in device memory. A request pins its expert's slot from admission to its last token; a pinned
slot is never overwritten, an unpinned one keeps its expert until another needs the place (least recently used first).
"""

import contextlib
import threading
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meswitch.artifact import Artifact
from meswitch.codec import Delta, ExactDelta
from meswitch.errors import CapacityError, UnknownExpertError
from meswitch.pagelock import copy
from meswitch.slots.host import HostCache
from meswitch.slots.layout import HEAD_TIED, Layout
from meswitch.slots.tables import SlotTables
from meswitch.units import format_bytes


@dataclass(slots=True)
class _Slot:
    buffer: Tensor
    expert: str | None = None
    ready: bool = False
    pins: int = 0
    used: int = 0  # clock of the last acquire
    tensors: Mapping[str, Delta | ExactDelta | Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Residency:
    """Where one expert's bytes are: `device`, `host` or `disk`; pins counts the requests that use it now."""

    expert: str
    place: str
    bytes: int
    slot: int | None
    pins: int


class ExpertStore:
    """The experts of one engine.

    Args:
        artifacts: opened artifacts by name.
        slots: fixed places on the device. host_bytes: budget of the host tier, None for no limit.
        kernel: lay packed deltas out for the GPU kernels, which find them through `tables`: all, none, or those of
            these names.
        tied: names that share another tensor where an artifact does not store them.

    Raises:
        CapacityError: less than one slot. ConfigError: a delta that no kernel reads.
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
    ) -> None:
        if slots < 1:
            raise CapacityError(f"slots: {slots}: an engine needs at least one slot")
        self.artifacts = dict(artifacts)
        self.layouts = {
            name: Layout.of(artifact, kernel=kernel, tied=tied) for name, artifact in self.artifacts.items()
        }
        self.device = device
        self.host = HostCache(host_bytes, device)
        self.slot_bytes = max((layout.nbytes for layout in self.layouts.values()), default=0)
        count = min(slots, max(1, len(self.artifacts)))
        self._arena = torch.zeros(count, self.slot_bytes, dtype=torch.uint8, device=device)
        self._slots = [_Slot(self._arena[i]) for i in range(count)]
        self.tables = SlotTables(self.layouts.values(), self._arena) if kernel is not False else None
        self._changed = threading.Condition()
        self._clock = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.loads = 0
        self.evictions = 0
        self.load_seconds = 0.0

    def tensors(self, slot: int) -> Mapping[str, Delta | ExactDelta | Tensor]:
        """The tensors of the expert that a pinned slot holds."""
        return self._slots[slot].tensors

    def try_acquire(self, name: str) -> int | None:
        """Pin the expert in a slot, loading it if a slot is free; None while all slots are in use by others.

        Raises:
            UnknownExpertError: no such expert. ArtifactError, CapacityError: it cannot be loaded.
        """
        if name not in self.artifacts:
            raise UnknownExpertError(f"no expert {name!r}; there are {', '.join(self.artifacts) or 'none'}")
        with self._changed:
            self._clock += 1
            index = self._find(name)
            if index is not None:
                slot = self._slots[index]
                slot.pins += 1
                slot.used = self._clock
                while not slot.ready and slot.expert == name:
                    self._changed.wait()
                if slot.expert != name:  # another thread's load of it failed
                    return None
                return index
            free = [i for i, slot in enumerate(self._slots) if not slot.pins]
            if not free:
                return None
            index = min(free, key=lambda i: (self._slots[i].expert is not None, self._slots[i].used))
            slot = self._slots[index]
            self.evictions += slot.expert is not None
            slot.expert, slot.ready, slot.pins, slot.used, slot.tensors = name, False, 1, self._clock, {}
        try:
            tensors = self._load(name, index)
        except BaseException:
            with self._changed:
                slot.expert, slot.ready, slot.pins = None, False, 0
                self._changed.notify_all()
            raise
        with self._changed:
            slot.tensors, slot.ready = tensors, True
            self._changed.notify_all()
        return index

    def acquire(self, name: str, timeout: float | None = None) -> int:
        """Like `try_acquire`, but wait for a slot.

        Raises:
            CapacityError: none became free within `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            index = self.try_acquire(name)
            if index is not None:
                return index
            with self._changed:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise CapacityError(
                        f"expert {name!r}: all {len(self._slots)} slots are in use; ask again or raise engine.slots"
                    )
                self._changed.wait(0.05 if left is None else min(left, 0.05))

    def release(self, slot: int) -> None:
        """Undo one acquire."""
        with self._changed:
            if self._slots[slot].pins < 1:
                raise AssertionError(f"slot {slot} is released more often than acquired")
            self._slots[slot].pins -= 1
            self._changed.notify_all()

    def residency(self) -> list[Residency]:
        """Every expert's place and bytes."""
        host = self.host.resident()
        with self._changed:
            rows = []
            for name, layout in self.layouts.items():
                index = self._find(name)
                place = "device" if index is not None else "host" if name in host else "disk"
                pins = self._slots[index].pins if index is not None else 0
                rows.append(Residency(name, place, layout.nbytes, index, pins))
            return rows

    @property
    def device_bytes(self) -> int:
        """Device memory of all slots, used or not, and of the tables that say where their deltas lie."""
        return self._arena.numel() + (0 if self.tables is None else self.tables.nbytes)

    @property
    def slot_count(self) -> int:
        return len(self._slots)

    def describe(self) -> str:
        return f"{self.slot_count} slots of {format_bytes(self.slot_bytes)} for {len(self.artifacts)} experts"

    def _find(self, name: str) -> int | None:
        return next((i for i, slot in enumerate(self._slots) if slot.expert == name), None)

    def _load(self, name: str, index: int) -> Mapping[str, Delta | ExactDelta | Tensor]:
        started = time.perf_counter()
        layout, buffer = self.layouts[name], self._slots[index].buffer
        # beside the computing stream: a step in flight does not use this slot
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            source = self.host.get(name, self.artifacts[name], layout)
            copy(buffer[: layout.nbytes], source, non_blocking=True)
            if self.tables is not None:
                self.tables.point(index, layout)
        if self._stream is not None:
            self._stream.synchronize()
        self.loads += 1
        self.load_seconds += time.perf_counter() - started
        return layout.views(buffer)

"""The slots: places on the device that experts are copied to, what is in them and who uses them.

The store decides who goes in when, and calls all of this under its lock but `fill`.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meswitch.codec import Delta, ExactDelta
from meswitch.pagelock import copy
from meswitch.slots.layout import Layout, SlotTables, table_layers
from meswitch.slots.versions import Version

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

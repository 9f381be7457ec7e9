"""Experts in host memory: least recently used out first, counted in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from meswitch.artifact import Artifact
from meswitch.errors import CapacityError
from meswitch.pagelock import page_locked
from meswitch.slots.layout import Layout
from meswitch.units import format_bytes


class HostCache:
    """Buffers of experts in (pinned) host memory.

    Args:
        budget: bytes; None is no limit. device: that of the slots; for a GPU the memory is page-locked.
    """

    def __init__(self, budget: int | None, device: torch.device) -> None:
        self.budget = budget
        self._device = device
        self._buffers: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, artifact: Artifact, layout: Layout) -> Tensor:
        """The expert's buffer [layout.nbytes] uint8, read from disk if it is not here.

        Raises:
            CapacityError: the expert alone is over the budget.
            ArtifactError: its files are damaged.
        """
        with self._lock:
            if name in self._buffers:
                self._buffers.move_to_end(name)
                return self._buffers[name]
            if self.budget is not None and layout.nbytes > self.budget:
                raise CapacityError(
                    f"expert {name!r} needs {format_bytes(layout.nbytes)} of host memory, the budget is "
                    f"{format_bytes(self.budget)}; raise engine.host_bytes"
                )
            while self.budget is not None and self.nbytes + layout.nbytes > self.budget:
                self._buffers.popitem(last=False)
            buffer = page_locked(layout.nbytes, self._device)
            layout.fill(artifact, buffer, self._device)
            self._buffers[name] = buffer
            return buffer

    def discard(self, name: str) -> None:
        with self._lock:
            self._buffers.pop(name, None)

    @property
    def nbytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())

    def resident(self) -> Mapping[str, int]:
        """Bytes by expert, least recently used first."""
        with self._lock:
            return {name: buffer.numel() for name, buffer in self._buffers.items()}

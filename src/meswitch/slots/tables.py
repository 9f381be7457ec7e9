"""Where each slot's delta of each layer lies, as the GPU kernels look it up."""

from collections.abc import Iterable

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.layout import ABSENT, Shape
from meswitch.ops.slots import SlotLinear, Variant
from meswitch.slots.layout import Layout


class SlotTables:
    """One `SlotLinear` for every tensor that some expert has packed, all over the slots' memory.

    Args:
        layouts: of all experts, made for kernels. arena: [slots, slot_bytes] uint8.

    Raises:
        ConfigError: experts whose deltas of one tensor no kernel reads together; it names the tensor.
    """

    def __init__(self, layouts: Iterable[Layout], arena: Tensor) -> None:
        shapes: dict[str, list[Shape]] = {}
        for layout in layouts:
            for name, (shape, _) in layout.kernel_places().items():
                shapes.setdefault(name, []).append(shape)
        slots, self._slot_bytes = arena.shape
        # a row for each tensor, so that what a slot holds changes in one copy
        self._tables = torch.tensor(ABSENT, device=arena.device).repeat(len(shapes), slots, 1)
        self.layers: dict[str, SlotLinear] = {}
        for table, (name, known) in zip(self._tables, shapes.items(), strict=True):
            try:
                variant = Variant.of(known)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
            self.layers[name] = SlotLinear.over(arena.view(-1), table, known[0].rows, known[0].in_features, variant)

    def point(self, slot: int, layout: Layout) -> None:
        """Make a slot's entries those of the expert that was copied there. In the order of the current stream."""
        places = layout.kernel_places()
        offset = slot * self._slot_bytes
        rows = [
            places[name][0].table_row(offset + places[name][1]) if name in places else ABSENT for name in self.layers
        ]
        if rows:
            self._tables[:, slot].copy_(torch.tensor(rows))

    @property
    def nbytes(self) -> int:
        """Of device memory."""
        return self._tables.nbytes + sum(layer.arrived.nbytes for layer in self.layers.values())

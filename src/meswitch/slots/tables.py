"""Where each slot's delta of each layer lies, as the GPU kernels look it up. Both engines' slots have these tables."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.layout import ABSENT, Shape, SlotLinear, Variant


class TableLayer(NamedTuple):
    """A linear layer that some expert changes. variant: what all its deltas fit."""

    rows: int
    in_features: int
    variant: Variant

    def refuses(self, shape: Shape) -> str | None:
        """Why a delta of this shape is not read here, None if it is."""
        two, one = shape.planes
        if (shape.rows, shape.in_features) != (self.rows, self.in_features):
            return f"shape: [{shape.rows}, {shape.in_features}], the slots take [{self.rows}, {self.in_features}]"
        if shape.group != self.variant.group:
            return f"group_size: {shape.group or None}, the slots take {self.variant.group or None}"
        if two > self.variant.two or (one and not self.variant.one):
            return f"bits: {shape.bits}, more than the slots were made for"
        if shape.salient > self.variant.salient:
            return f"salient: {shape.salient} channels, the slots take {self.variant.salient}"
        return None


class SlotTables:
    """One `SlotLinear` for every layer, all over the slots' memory.

    Args:
        memory: [bytes] uint8, of all slots.
        slots: how many there are.
        layers: by name.
    """

    def __init__(self, memory: Tensor, slots: int, layers: Mapping[str, TableLayer]) -> None:
        # a row for each layer, so that what a slot holds changes in one copy
        self.rows = torch.tensor(ABSENT, device=memory.device).repeat(len(layers), slots, 1)
        self.known = dict(layers)
        self.layers = {
            name: SlotLinear.over(memory, table, layer.rows, layer.in_features, layer.variant)
            for table, (name, layer) in zip(self.rows, layers.items(), strict=True)
        }

    def point(self, slot: int, places: Mapping[str, tuple[Shape, int]]) -> None:
        """Make a slot's entries those of the expert that was copied there. In the order of the current stream.

        Args:
            slot: which.
            places: shape and first byte in `memory` of each delta that the expert has; the others are absent.
        """
        rows = [places[name][0].table_row(places[name][1]) if name in places else ABSENT for name in self.layers]
        if rows:
            self.rows[:, slot].copy_(torch.tensor(rows), non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Of device memory."""
        return self.rows.nbytes + sum(layer.arrived.nbytes for layer in self.layers.values())


def table_layers(shapes: Iterable[tuple[str, Shape]]) -> dict[str, TableLayer]:
    """The layers that hold all these deltas.

    Args:
        shapes: of every expert's deltas, by tensor name.

    Raises:
        ConfigError: experts whose deltas of one tensor no kernel reads together; it names the tensor.
    """
    known: dict[str, list[Shape]] = {}
    for name, shape in shapes:
        known.setdefault(name, []).append(shape)
    layers = {}
    for name, found in known.items():
        try:
            layers[name] = TableLayer(found[0].rows, found[0].in_features, Variant.of(found))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return layers

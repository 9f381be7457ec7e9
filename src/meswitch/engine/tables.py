"""What experts have of their own beside packed deltas: norms, biases, rows of added tokens, in tables by slot.

A captured graph reads the same addresses in every replay, so it cannot look an expert up. In a table, each row of a
step finds its expert's values by the number of its slot; the base's lie last, where the base's number, -1, points to.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meswitch.codec import Delta

Tensors = Mapping[str, Delta | Tensor]


@dataclass(frozen=True, slots=True)
class Own:
    """A tensor that experts may have of their own.

    Args:
        name: under which they store it.
        base: the base's, of which a part may be another expert's.
        added: for rows of added tokens, how many the largest expert has; 0 for a tensor in place of the base's.
    """

    name: str
    base: Tensor
    added: int = 0


@dataclass(frozen=True, slots=True)
class OwnTable:
    """One tensor of all slots.

    Args:
        values: [slots + 1, *shape], the base's last; of added tokens [slots + 1, tokens, width], zeros for the base.
        counts: [slots + 1] int64, how many added tokens each slot has.
        added: whether it is of added tokens.
    """

    values: Tensor
    counts: Tensor
    added: bool


@dataclass(slots=True)
class OwnTables:
    """The tables of one model's layers.

    Args:
        slots: how many there are.
        wanted: what the layers look up.
        others: names that layers read, for which there is no table: a slot that has one cannot be served from tables.
    """

    slots: int
    wanted: Iterable[Own]
    others: frozenset[str]
    _tables: dict[str, OwnTable] = field(default_factory=dict)
    _filled: dict[int, tuple[Tensors, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for own in self.wanted:
            shape = (own.added, own.base.shape[1]) if own.added else tuple(own.base.shape)
            values = torch.zeros(self.slots + 1, *shape, dtype=own.base.dtype, device=own.base.device)
            counts = torch.zeros(self.slots + 1, dtype=torch.int64, device=own.base.device)
            if not own.added:
                values.copy_(own.base.detach().expand_as(values))
            self._tables[own.name] = OwnTable(values, counts, own.added > 0)

    @property
    def nbytes(self) -> int:
        """Of device memory."""
        return sum(table.values.nbytes + table.counts.nbytes for table in self._tables.values())

    def get(self, name: str) -> OwnTable | None:
        return self._tables.get(name)

    def fill(self, slot: int, tensors: Tensors) -> bool:
        """Copy what the expert in a slot has, unless it is there already. In the order of the current stream.

        Args:
            tensors: the expert's; another object after every load.

        Returns:
            whether the tables and the kernels have all of it.
        """
        known = self._filled.get(slot)
        if known is not None and known[0] is tensors:
            return known[1]
        is_whole = all(
            name not in self.others and isinstance(own, Tensor)
            for name, own in tensors.items()
            if name in self.others or name in self._tables
        )
        if is_whole:
            is_whole = all(self._put(slot, name, table, tensors.get(name)) for name, table in self._tables.items())
        self._filled[slot] = tensors, is_whole
        return is_whole

    def _put(self, slot: int, name: str, table: OwnTable, own: Delta | Tensor | None) -> bool:
        values = table.values
        if own is None:
            values[slot].copy_(values[-1])
            table.counts[slot].fill_(0)
            return True
        if not isinstance(own, Tensor):
            return False
        if table.added:
            if own.shape[1:] != values.shape[2:] or len(own) > values.shape[1]:
                return False
            values[slot, : len(own)].copy_(own)
            table.counts[slot].fill_(len(own))
            return True
        if own.shape != values.shape[1:]:
            return False
        values[slot].copy_(own)
        return True

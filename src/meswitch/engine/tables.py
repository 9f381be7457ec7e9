"""What experts have of their own beside packed deltas: norms, biases, added tokens, low-rank pairs, in tables by slot.

A captured graph reads the same addresses in every replay, so it cannot look an expert up. In a table, each row of a
step finds its expert's values by the number of its slot; the base's lie last, where the base's number, -1, points to.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meswitch.codec import Delta, LowRankDelta
from meswitch.slots.layout import extra_name

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


@dataclass(frozen=True, slots=True)
class LowRankTable:
    """The low-rank deltas of one matrix in all slots; an expert of a lower rank has zeros, and so has the base.

    Args:
        left: [slots + 1, rank, rows]. right: [slots + 1, rank, in_features], with the deltas' factors.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, slots: int, rank: int, weight: Tensor) -> "LowRankTable":
        rows, width = weight.shape
        left, right = (weight.new_zeros(slots + 1, rank, size) for size in (rows, width))
        return cls(left, right)

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def put(self, slot: int, own: LowRankDelta | None) -> bool:
        """Copy an expert's delta, or none; whether it has room here."""
        self.left[slot].zero_()
        self.right[slot].zero_()
        if own is None:
            return True
        rank = own.rank
        shape = self.left.shape[2], self.right.shape[2]
        if rank > self.left.shape[1] or own.matrices != 1 or (own.rows, own.in_features) != shape:
            return False
        self.left[slot, :rank].copy_(own.left.T)
        self.right[slot, :rank].copy_(own.right.float() * own.scale)
        return True

    def product(self, x: Tensor, slots: Tensor) -> Tensor:
        """What each row's expert adds: [n, in_features] -> [n, rows]. slots: [n] int32, -1 for the base."""
        count, rank, width = self.right.shape
        narrow = (x @ self.right.view(-1, width).T).view(len(x), count, rank)
        others = torch.arange(count, device=x.device) != slots[:, None]
        return narrow.masked_fill(others[..., None], 0).view(len(x), -1) @ self.left.view(count * rank, -1)

    def rows(self, ids: Tensor, slots: Tensor) -> Tensor:
        """What each token's expert adds to its embedding: [n] int64 -> [n, in_features]. Others' ids give anything."""
        left = self.left[slots, :, ids.clamp(max=self.left.shape[2] - 1)]
        return torch.bmm(left[:, None], self.right[slots])[:, 0]


@dataclass(slots=True)
class OwnTables:
    """The tables of one model's layers.

    Args:
        slots: how many there are.
        wanted: what the layers look up.
        low_rank: matrices of which some expert has a low-rank delta -> the base's weight, and the highest rank.
        others: names that layers read, for which there is no table: a slot that has one cannot be served from tables.
    """

    slots: int
    wanted: Iterable[Own]
    low_rank: Mapping[str, tuple[Tensor, int]]
    others: frozenset[str]
    _low_rank: dict[str, LowRankTable] = field(default_factory=dict)
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
        for name, (weight, rank) in self.low_rank.items():
            self._low_rank[name] = LowRankTable.of(self.slots, rank, weight.detach())

    @property
    def nbytes(self) -> int:
        """Of device memory."""
        own = sum(table.values.nbytes + table.counts.nbytes for table in self._tables.values())
        return own + sum(table.nbytes for table in self._low_rank.values())

    def get(self, name: str) -> OwnTable | None:
        return self._tables.get(name)

    def get_low_rank(self, name: str) -> LowRankTable | None:
        return self._low_rank.get(name)

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
        self._filled[slot] = tensors, False  # until all of it is there
        tensors_here = dict(tensors)
        for name, low in self._low_rank.items():
            own = tensors_here.pop(name, None)
            if not (own is None or isinstance(own, LowRankDelta)) or not low.put(slot, own):
                return False
            if own is not None and own.extra is not None:
                tensors_here[extra_name(name)] = own.extra
        if not self.others.isdisjoint(tensors_here):
            return False
        if not all(self._put(slot, name, table, tensors_here.get(name)) for name, table in self._tables.items()):
            return False
        self._filled[slot] = tensors, True
        return True

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

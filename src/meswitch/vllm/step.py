"""Which token of the running step belongs to which slot: static buffers, filled on the host before the step.

A captured CUDA graph replays with these addresses, so nothing here is replaced once it is made, and nothing waits for
the device.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops import Routing
from meswitch.ops.linear import MAX_TOKENS
from meswitch.ops.routing import BASE, bucket, by_slot

TOKENS, HEAD = 0, 1  # rows of the model's layers, rows that reach the head


class Side:
    """The slots of a step's rows.

    token_slots: [capacity] int32 on the device, -1 for the base and beyond the step.
    """

    def __init__(self, capacity: int, slots: int, device: torch.device) -> None:
        self.least = bucket(slots)
        pieces = bucket(slots + -(-capacity // MAX_TOKENS))
        self.token_slots = torch.full((capacity,), BASE, dtype=torch.int32, device=device)
        self.host: list[int] = []
        self.active = False
        self._pieces = self.least
        self._slots = torch.full((pieces,), BASE, dtype=torch.int32, device=device)
        self._starts = torch.zeros(pieces + 1, dtype=torch.int32, device=device)
        self._order = torch.zeros(capacity, dtype=torch.int32, device=device)

    def fill(self, token_slots: Sequence[int]) -> None:
        """Set the slots of the step's rows; the rest is the base's."""
        before, now = len(self.host), len(token_slots)
        if now > len(self.token_slots):
            raise ConfigError(f"{now} rows in a step that was announced with at most {len(self.token_slots)}")
        self.host = list(token_slots)
        self.active = any(slot != BASE for slot in token_slots)
        _copy(self.token_slots, torch.tensor(self.host, dtype=torch.int32))
        if before > now:
            self.token_slots[now:before].fill_(BASE)
        if not self.active:
            self._slots.fill_(BASE)  # a graph that was captured with experts may be replayed without any
            return
        owners, routing = _pieces(self.host, self.least)
        self._pieces = len(owners)
        _copy(self._slots, torch.tensor(owners, dtype=torch.int32))
        _copy(self._starts, routing.starts)
        _copy(self._order, routing.order)

    def routing(self, rows: int) -> Routing | None:
        """The step's rows sorted by slot, for `rows` of which the last may be padding; None if all are the base's."""
        if not self.active:
            return None
        most = min(bucket(rows, least=8), MAX_TOKENS)
        return Routing(self._slots[: self._pieces], self._starts[: self._pieces + 1], self._order[:rows], most)


def part(side: Side, first: int, rows: int) -> Routing | None:
    """Of some consecutive rows of a step only, such as one request's prompt."""
    own = side.host[first : first + rows]
    if len(own) != rows or all(slot == BASE for slot in own):
        return None
    owners, routing = _pieces(own, side.least)
    device = side.token_slots.device
    slots = torch.tensor(owners, dtype=torch.int32, device=device)
    return Routing(slots, routing.starts.to(device), routing.order.to(device), MAX_TOKENS)


class Step:
    """Both sides of the step of one model."""

    def __init__(self, capacity: int, slots: int, device: torch.device) -> None:
        self.sides = (Side(capacity, slots, device), Side(capacity, slots, device))
        self.dummy = False  # vLLM warms up: the slots are empty and the rows may be any

    @property
    def tokens(self) -> Side:
        return self.sides[TOKENS]

    @property
    def head(self) -> Side:
        return self.sides[HEAD]


def _pieces(token_slots: Sequence[int], least: int) -> tuple[list[int], Routing]:
    """Rows by slot, in pieces of what the decode kernel takes: the slot of each piece, and the routing by piece."""
    owners: list[int] = []
    places = [BASE] * len(token_slots)
    for slot, own in by_slot(token_slots).items():
        if slot == BASE:
            continue
        for start in range(0, len(own), MAX_TOKENS):
            for position in own[start : start + MAX_TOKENS]:
                places[position] = len(owners)
            owners.append(slot)
    count = bucket(len(owners), least)
    routing = Routing.build(places, experts=count, max_tokens=MAX_TOKENS)
    return owners + [BASE] * (count - len(owners)), replace(routing, max_tokens=MAX_TOKENS)


def _copy(target: Tensor, source: Tensor) -> None:
    if target.device.type == "cuda":
        source = source.pin_memory()
    target[: len(source)].copy_(source, non_blocking=True)

"""Which token of the running step belongs to which slot: static buffers, filled on the host before the step.

A captured CUDA graph replays with these addresses, so nothing here is replaced once it is made, and nothing waits for
the device.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops import PrefillRouting, Routing
from meswitch.ops.routing import BASE, MAX_TOKENS, PIECE, most_pieces

TOKENS, HEAD = 0, 1  # rows of the model's layers, rows that reach the head


class Side:
    """The slots of a step's rows.

    Args:
        specialized: there is a graph for each number of experts, not one for all.

    token_slots: [capacity] int32 on the device, -1 for the base and beyond the step.
    """

    def __init__(self, capacity: int, slots: int, device: torch.device, specialized: bool = False) -> None:
        self.slots, self._small, self._specialized = slots, min(capacity, MAX_TOKENS), specialized
        self.token_slots = torch.full((capacity,), BASE, dtype=torch.int32, device=device)
        self.host: list[int] = []
        self.active = False
        pieces = most_pieces(self._small, slots)
        self._slots = torch.full((pieces,), BASE, dtype=torch.int32, device=device)
        self._starts = torch.zeros(pieces + 1, dtype=torch.int32, device=device)
        self._order = torch.arange(self._small, dtype=torch.int32, device=device)
        self._large: dict[int, Routing] = {}
        self._prefill: dict[int, PrefillRouting] = {}

    def fill(self, token_slots: Sequence[int]) -> None:
        """Set the slots of the step's rows; the rest is the base's."""
        if len(token_slots) > len(self.token_slots):
            rows, most = len(token_slots), len(self.token_slots)
            raise ConfigError(f"{rows} rows in a step that was announced with at most {most}")
        try:
            self._fill(token_slots)
        except BaseException:
            self.host = []  # what the buffers hold is not known
            self.token_slots.fill_(BASE)
            raise

    def _fill(self, token_slots: Sequence[int]) -> None:
        before, now = len(self.host), len(token_slots)
        self.host = list(token_slots)
        self.active = any(slot != BASE for slot in token_slots)
        self._large, self._prefill = {}, {}
        _copy(self.token_slots, torch.tensor(self.host, dtype=torch.int32))
        if before > now:
            self.token_slots[now:before].fill_(BASE)
        if now > self._small:  # no graph holds such a step: it is sorted when a layer asks
            return
        # even without experts: a graph that was captured with some may be replayed, and writes its rows in `order`
        routing = Routing.build(self._padded(self._small), pieces=len(self._slots))
        _copy(self._slots, routing.slots)
        _copy(self._starts, routing.starts)
        _copy(self._order, routing.order)

    def routing(self, rows: int) -> Routing | None:
        """The step's rows sorted by slot, for `rows` of which the last may be padding; None if all are the base's.

        The shapes of a step of up to `MAX_TOKENS` rows depend on `rows` alone, or also on the number of experts where
        graphs are specialized on it, so that a captured graph serves them all.
        """
        if not self.active:
            return None
        if len(self.host) > self._small:
            if rows not in self._large:
                pieces, likely = _pieces(rows, self.slots, MAX_TOKENS)
                sizes = {"pieces": pieces, "piece": MAX_TOKENS}
                routing = Routing.build(self._padded(rows), self.token_slots.device, **sizes)
                self._large[rows] = replace(routing, likely=likely)
            return self._large[rows]
        slots = len(set(self.host) - {BASE}) if self._specialized else self.slots
        pieces, likely = _pieces(min(rows, self._small), slots, PIECE)
        return Routing(self._slots[:pieces], self._starts[: pieces + 1], self._order[:rows], PIECE, likely)

    def prefill(self, rows: int) -> PrefillRouting:
        """The same for a step of many rows, which no graph holds."""
        if rows not in self._prefill:
            self._prefill[rows] = PrefillRouting.build(self._padded(rows), self.token_slots.device)
        return self._prefill[rows]

    def _padded(self, rows: int) -> list[int]:
        return self.host + [BASE] * (rows - len(self.host))


def _pieces(rows: int, slots: int, piece: int) -> tuple[int, int]:
    """How many pieces rows of so many slots have at most, and if they are spread evenly."""
    most = most_pieces(rows, slots, piece)
    return most, min(most, max(min(slots, rows), -(-rows // piece)))


def step_sizes(rows: Iterable[int], slots: int) -> set[tuple[int, int, int]]:
    """(rows, pieces, likely pieces) of steps of so many rows with experts in so many slots: what kernels depend on."""
    return {(count, *_pieces(count, slots, PIECE)) for count in rows}


def part(side: Side, first: int, rows: int) -> Routing | None:
    """Of some consecutive rows of a step only, such as one request's prompt."""
    own = side.host[first : first + rows]
    if len(own) != rows or all(slot == BASE for slot in own):
        return None
    return Routing.build(own, side.token_slots.device, piece=MAX_TOKENS)


class Step:
    """Both sides of the step of one model."""

    def __init__(self, capacity: int, slots: int, device: torch.device, specialized: bool = False) -> None:
        self.sides = tuple(Side(capacity, slots, device, specialized) for _ in (TOKENS, HEAD))
        self.dummy = False  # vLLM warms up: the slots are empty and the rows may be any

    @property
    def tokens(self) -> Side:
        return self.sides[TOKENS]

    @property
    def head(self) -> Side:
        return self.sides[HEAD]


def is_idle(step: Step, x: Tensor) -> bool:
    """No request of the step has an expert. Only asked where neither a trace nor a graph would keep the answer."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not (step.tokens.active or step.head.active)


def _copy(target: Tensor, source: Tensor) -> None:
    if target.device.type == "cuda":
        source = source.pin_memory()
    target[: len(source)].copy_(source, non_blocking=True)

"""Which token of the running step belongs to which slot: static buffers, filled on the host before the step.

A captured CUDA graph replays with these addresses, so nothing here is replaced once it is made, and nothing waits for
the device.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.routing import (
    BASE,
    MAX_TOKENS,
    PIECE,
    PrefillRouting,
    Routing,
    StaticRouting,
    bucket,
    into,
    most_likely,
)

TOKENS, HEAD = 0, 1  # rows of the model's layers, rows that reach the head


class Side:
    """The slots of a step's rows.

    Steps of up to `MAX_TOKENS` rows and steps of more, up to `recorded`, have buffers of their own, for their kernels
    read other forms. Only those of the step that was filled last are up to date.

    Args:
        capacity: rows of the largest step.
        slots: of the experts.
        specialized: there is a graph for each number of experts in `expert_counts`, not one for all.
        recorded: rows of the largest step that a graph holds.

    Attributes:
        token_slots: [capacity] int32 on the device, -1 for the base and beyond the step.
        host: the slots of the step's rows; empty where it is not known what the buffers hold.
        active: whether some row is an expert's.
        least_experts: a specialized step that has experts is computed as if it had so many at least.
    """

    def __init__(
        self,
        capacity: int,
        slots: int,
        device: torch.device,
        specialized: bool = False,
        recorded: int = MAX_TOKENS,
    ) -> None:
        self.slots, self._small, self._specialized = slots, min(capacity, MAX_TOKENS), specialized
        self._recorded = min(capacity, recorded)
        self.token_slots = torch.full((capacity,), BASE, dtype=torch.int32, device=device)
        self.host: list[int] = []
        self.active = False
        self.least_experts = 0
        self._few = Routing.room(self._small, slots, PIECE, device)
        self._many = StaticRouting(self._recorded, slots, device) if self._recorded > self._small else None
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
        into(self.token_slots, torch.tensor(self.host, dtype=torch.int32))
        if before > now:
            self.token_slots[now:before].fill_(BASE)
        if now > self._recorded:  # no graph holds such a step: it is sorted when a layer asks
            return
        if now <= self._small or self._many is None:
            self._few.fill(self._padded(self._small))
        else:
            self._many.fill(self.host)

    def routing(self, rows: int) -> Routing | None:
        """The step's rows sorted by slot; None if all are the base's.

        The shapes of a step of up to `MAX_TOKENS` rows depend on `rows` alone, so that one captured graph serves them
        all; where graphs are specialized, also on the number of experts.

        Args:
            rows: of the step, with padding at its end.
        """
        if not self.active:
            return None
        if len(self.host) > self._small:
            if rows not in self._large:
                pieces, likely = most_likely(rows, self.slots, MAX_TOKENS)
                sizes = {"pieces": pieces, "piece": MAX_TOKENS}
                routing = Routing.build(self._padded(rows), self.token_slots.device, **sizes)
                self._large[rows] = replace(routing, likely=likely)
            return self._large[rows]
        slots = counted(self._experts, self.slots) if self._specialized else self.slots
        return self._few.part(rows, *most_likely(min(rows, self._small), slots, PIECE))

    @property
    def _experts(self) -> int:
        return max(self.least_experts, len(set(self.host) - {BASE}))

    def static(self, rows: int) -> tuple[Routing, Routing, Tensor | None]:
        """A step of more than `MAX_TOKENS` rows that a graph holds, as `StaticRouting.part` gives it.

        Args:
            rows: of the graph. The step was filled with as many.
        """
        assert self._many is not None
        return self._many.part(rows)

    def prefill(self, rows: int) -> PrefillRouting:
        """The step's rows for layers that give experts of many rows weights of their own; no graph holds such a step.

        Args:
            rows: of the step, with padding at its end.
        """
        if rows not in self._prefill:
            self._prefill[rows] = PrefillRouting.build(self._padded(rows), self.token_slots.device)
        return self._prefill[rows]

    def _padded(self, rows: int) -> list[int]:
        return self.host + [BASE] * (rows - len(self.host))


def expert_counts(slots: int) -> list[int]:
    """Numbers of experts for which a specialized step has kernels: powers of two, and as many as there are slots."""
    return sorted({counted(count, slots) for count in range(1, slots + 1)})


def counted(experts: int, slots: int) -> int:
    """The number of `expert_counts` that a step of so many experts is computed for; 0 for none."""
    return min(slots, bucket(experts)) if experts else 0


def step_sizes(rows: Iterable[int], slots: int) -> set[tuple[int, int, int]]:
    """(rows, pieces, likely pieces) of steps of so many rows with experts in so many slots: what kernels depend on."""
    return {(count, *most_likely(count, slots, PIECE)) for count in rows}


def part(side: Side, first: int, rows: int) -> Routing | None:
    """Of some consecutive rows of a step only, such as one request's prompt."""
    own = side.host[first : first + rows]
    if len(own) != rows or all(slot == BASE for slot in own):
        return None
    return Routing.build(own, side.token_slots.device, piece=MAX_TOKENS)


class Step:
    """Both sides of the step of one model; arguments as of `Side`."""

    def __init__(
        self,
        capacity: int,
        slots: int,
        device: torch.device,
        specialized: bool = False,
        recorded: int = MAX_TOKENS,
    ) -> None:
        self.sides = tuple(Side(capacity, slots, device, specialized, recorded) for _ in (TOKENS, HEAD))
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

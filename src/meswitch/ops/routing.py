"""Which tokens of a step belong to which expert's slot, as the kernels read it; all of it is known on the host.

`Routing` is for steps of few tokens, `PrefillRouting` for long prompts, whose experts get weights of their own, and
`StaticRouting` for steps of many rows that a captured graph holds.

`Step` has the buffers of the running step, filled on the host before it. A captured CUDA graph replays with their
addresses, so none of them is replaced once it is made, and nothing waits for the device.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.triton import on_hopper

BASE = -1
MAX_TOKENS = 64  # of a piece, and of a step in the fused kernel
TOKENS, HEAD = 0, 1  # rows of the model's layers, rows that reach the head
PIECE = 8  # tokens that a piece has at most: the least that the matrix unit multiplies at once


@dataclass(frozen=True, slots=True)
class Routing:
    """Tokens sorted by slot and cut into pieces of one slot each; the base's tokens come last and are in no piece.

    Kernels choose their tiles by `piece`, `likely` and the number of pieces, and by nothing else of a batch. So what a
    token gives does not depend on who shares its batch, and one expert's many tokens do not give others larger tiles.

    Args:
        slots: [pieces] int32, the slot of each piece, -1 for an unused one.
        starts: [pieces + 1] int32, piece p is `order[starts[p] : starts[p + 1]]`.
        order: [tokens] int32, positions in the step.
        piece: tokens that a piece has at most.
        likely: pieces that a step of this size has as a rule, at least 1.
    """

    slots: Tensor
    starts: Tensor
    order: Tensor
    piece: int
    likely: int

    @classmethod
    def build(
        cls,
        token_slots: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        pieces: int | None = None,
        piece: int = PIECE,
    ) -> "Routing":
        """Sort a step's tokens.

        Args:
            token_slots: the slot of each token, `BASE` for none.
            pieces: room for so many; by default for as many as there are.
            piece: tokens that one has at most.

        Raises:
            ValueError: the tokens need more pieces.
        """
        tokens = by_slot(token_slots)
        owners, starts, order = list[int](), [0], list[int]()
        for slot in sorted(tokens.keys() - {BASE}):
            own = tokens[slot]
            order += own
            for start in range(0, len(own), piece):
                owners.append(slot)
                starts.append(starts[-1] + min(piece, len(own) - start))
        pieces = pieces or max(1, len(owners))
        if len(owners) > pieces:
            raise ValueError(f"{len(owners)} pieces where there is room for {pieces}")
        unused = pieces - len(owners)
        parts = [owners + [BASE] * unused, starts + starts[-1:] * unused, order + tokens.get(BASE, [])]
        padded = [part + [0] * (-len(part) % 4) for part in parts]  # 16-byte aligned, or Triton compiles anew
        flat = torch.tensor([*padded[0], *padded[1], *padded[2]], dtype=torch.int32).to(device)  # one copy
        places = flat.split([len(part) for part in padded])
        slots, begins, positions = (place[: len(part)] for place, part in zip(places, parts, strict=True))
        return cls(slots, begins, positions, piece, likely_pieces(pieces))

    @classmethod
    def room(cls, rows: int, slots: int, piece: int, device: torch.device) -> "Routing":
        """Buffers for any step of so many rows; all rows are the base's so far."""
        pieces = most_pieces(rows, slots, piece)
        owners = torch.full((pieces,), BASE, dtype=torch.int32, device=device)
        starts = torch.zeros(pieces + 1, dtype=torch.int32, device=device)
        return cls(owners, starts, torch.arange(rows, dtype=torch.int32, device=device), piece, pieces)

    def fill(self, token_slots: Sequence[int]) -> None:
        """Sort a step's rows into these buffers, also those of a step without experts.

        A graph that was captured with experts is replayed for such a step too, and writes only the rows in `order`.

        Args:
            token_slots: as many as `order` has places.
        """
        found = Routing.build(token_slots, pieces=len(self.slots), piece=self.piece)
        into(self.slots, found.slots)
        into(self.starts, found.starts)
        into(self.order, found.order)

    def part(self, rows: int, pieces: int, likely: int) -> "Routing":
        """As a step of so many rows reads these buffers."""
        return Routing(self.slots[:pieces], self.starts[: pieces + 1], self.order[:rows], self.piece, likely)


def most_pieces(tokens: int, slots: int, piece: int = PIECE) -> int:
    """Pieces that so many tokens of so many slots have at most, however they are spread."""
    return (tokens + (piece - 1) * min(slots, tokens)) // piece


def likely_pieces(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: few enough that kernels are not compiled anew for each."""
    most = bucket(count)
    return most * 3 // 4 if count <= most * 3 // 4 else most


def by_slot(token_slots: Sequence[int]) -> dict[int, list[int]]:
    """The positions of each slot's tokens; slots in the order in which they first appear."""
    tokens: dict[int, list[int]] = {}
    for position, slot in enumerate(token_slots):
        tokens.setdefault(slot, []).append(position)
    return tokens


def bucket(count: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << max(count - 1, 0).bit_length())


TILE_TOKENS = 256  # of a tile of the product that restores weights
OWN_FROM = 64  # tokens of one expert from which the restoring product costs less than the decode kernel; measured
MERGE_FROM = 256  # from which merging does, where weights can't be restored in the product
LONG_FROM = 4096  # from which merging costs less than the restoring product


def token_tiles(segments: Sequence[tuple[int, int, int]], tokens: int) -> list[tuple[int, int, int, int]]:
    """First token of each tile, its segment's first token and end, the slot.

    A step's last tile starts early enough to end with the step: rows beyond the step would have to be filled with
    zeros, which takes longer than reading rows again. What a tile computes of tokens before its segment is not written.

    Args:
        segments: first token, end and slot of each.
        tokens: of the step.
    """
    last = max(0, tokens - TILE_TOKENS)
    return [
        (min(start, last), first, end, slot)
        for first, end, slot in segments
        for start in range(first, end, TILE_TOKENS)
    ]


def tile_table(segments: Sequence[tuple[int, int, int]], tokens: int) -> Tensor:
    """[1 + tiles, 4] int32 on the host, as the kernel reads it: how many tiles in the first place, then the tiles.

    Args:
        segments: first token, end and slot of each.
        tokens: of the step.
    """
    tiles = token_tiles(segments, tokens)
    return torch.tensor([(len(tiles), 0, 0, 0), *tiles], dtype=torch.int32)


@dataclass(frozen=True)
class PrefillRouting:
    """Tokens brought together by slot, in the order in which the slots first appear.

    A step whose tokens lie together already is used as it is, which saves two copies a layer; so a scheduler does well
    to put one expert's requests side by side. All positions but those in `order` are of the sorted step.

    Args:
        order: [tokens] int64, where each token of the sorted step comes from; None if it is sorted as it is.
        own: first token and end of each segment that gets weights of its own, long ones first.
        own_slots: [own] int32.
        long: how many of `own` are long: their weights are merged, see `LONG_FROM`.
        tiles: [1 + tiles, 4] int32, the others of `own`, for `triton.product`.
        plain: first token and end of each stretch that gets the base's weights.
        short: the tokens of `plain` that have an expert, for the decode kernel; None if there are none.
        token_slots: what it was built from, if `own_from` was left to it.
    """

    order: Tensor | None
    own: tuple[tuple[int, int], ...]
    own_slots: Tensor
    long: int
    tiles: Tensor
    plain: tuple[tuple[int, int], ...]
    short: Routing | None
    token_slots: Sequence[int] | None

    @cached_property
    def merging(self) -> "PrefillRouting":
        """The same step for layers whose weights can't be restored in the product."""
        if self.token_slots is None or all(end - first >= MERGE_FROM for first, end in self.own):
            return self
        return PrefillRouting.build(self.token_slots, self.own_slots.device, own_from=MERGE_FROM)

    @classmethod
    def build(
        cls, token_slots: Sequence[int], device: torch.device | str = "cpu", *, own_from: int | None = None
    ) -> "PrefillRouting":
        """Sort a step's tokens.

        Args:
            token_slots: the slot of each token, `BASE` for none.
            own_from: tokens of an expert from which it gets weights of its own; fewer go to the base's product and the
                decode kernel. By default what is best on the device.
        """
        asked = own_from is not None
        own_from = own_from or (OWN_FROM if on_hopper(torch.device(device)) else MERGE_FROM)
        tokens = by_slot(token_slots)
        order = [position for own in tokens.values() for position in own]
        segments, plain, start, owners = [], [], 0, [BASE] * len(order)
        for slot, own in tokens.items():
            span = start, start + len(own)
            start = span[1]
            if slot != BASE and len(own) >= own_from:
                segments.append((*span, slot))
                continue
            plain.append(span)
            owners[slice(*span)] = [slot] * len(own)
        segments.sort(key=lambda segment: segment[1] - segment[0] < LONG_FROM)
        long = sum(end - first >= LONG_FROM for first, end, _ in segments)
        tiles = tile_table(segments[long:], len(order))
        return cls(
            None if order == list(range(len(order))) else torch.tensor(order).to(device, non_blocking=True),
            tuple((first, end) for first, end, _ in segments),
            torch.tensor([slot for _, _, slot in segments], dtype=torch.int32).to(device, non_blocking=True),
            long,
            tiles.to(device, non_blocking=True),
            _joined(plain),
            Routing.build(owners, device, piece=MAX_TOKENS) if any(slot != BASE for slot in owners) else None,
            None if asked else token_slots,
        )


def _joined(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbouring spans as one, for one product."""
    joined: list[tuple[int, int]] = []
    for first, last in spans:
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], last
        else:
            joined.append((first, last))
    return tuple(joined)


class StaticRouting:
    """Buffers for any step of so many rows.

    A layer reads either `all`, beside the base's product, or `tiles` and `short`.

    Args:
        rows: of the largest step.
        slots: of the expert store.

    Attributes:
        all: the rows of every expert, in pieces of up to `PIECE`.
        short: those of them that are in no stretch of `OWN_FROM` rows and so get the base's weights from `tiles`.
        tiles: [1 + room, 4] int32 for `triton.product`; None where no product restores weights.
    """

    def __init__(self, rows: int, slots: int, device: torch.device) -> None:
        self._slots = slots
        self.all, self.short = (Routing.room(rows, slots, PIECE, device) for _ in range(2))
        self.tiles: Tensor | None = None
        if on_hopper(device):
            self.tiles = torch.zeros(1 + most_tiles(rows), 4, dtype=torch.int32, device=device)

    def fill(self, token_slots: Sequence[int]) -> None:
        """Say whose the rows are.

        Args:
            token_slots: of as many rows as the graph has that is replayed; those after the step's are `BASE`.
        """
        rows = len(self.all.order)
        padded = [*token_slots, *[BASE] * (rows - len(token_slots))]
        self.all.fill(padded)
        if self.tiles is None:
            return
        segments = list(_segments(token_slots))
        table = tile_table(segments, len(token_slots))
        into(self.tiles, table)
        for first, end, slot in segments:
            if slot != BASE:
                padded[first:end] = [BASE] * (end - first)
        self.short.fill(padded)

    def part(self, rows: int) -> tuple[Routing, Routing, Tensor | None]:
        """`all`, `short` and `tiles` as a graph of so many rows reads them."""
        pieces, likely = most_likely(rows, self._slots, PIECE)
        every, short = (buffers.part(rows, pieces, likely) for buffers in (self.all, self.short))
        return every, short, None if self.tiles is None else self.tiles[: 1 + most_tiles(rows)]


def _segments(token_slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """First row, end and slot of each stretch that gets one expert's weights, or, as `BASE`, the base's."""
    begun, start = 0, 0
    for slot, own in itertools.groupby(token_slots):
        end = start + sum(1 for _ in own)
        if slot != BASE and end - start >= OWN_FROM:
            if begun < start:
                yield begun, start, BASE
            yield start, end, slot
            begun = end
        start = end
    if begun < start:
        yield begun, start, BASE


def most_tiles(rows: int) -> int:
    """Of a step of so many rows, however they are spread."""
    own = rows // OWN_FROM
    return rows // TILE_TOKENS + 2 * own + 1


def most_likely(rows: int, slots: int, piece: int) -> tuple[int, int]:
    """How many pieces rows of so many slots have at most, and how many if the slots have equal shares."""
    most = most_pieces(rows, slots, piece)
    return most, min(most, max(min(slots, rows), -(-rows // piece)))


def into(target: Tensor, source: Tensor) -> None:
    """Copy to the beginning of target, in the order of the current stream, without a wait."""
    if target.device.type == "cuda":
        source = source.pin_memory()
    target[: len(source)].copy_(source, non_blocking=True)


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
        slots = self.experts if self._specialized else self.slots
        return self._few.part(rows, *most_likely(min(rows, self._small), slots, PIECE))

    @property
    def experts(self) -> int:
        """The number of `expert_counts` that a specialized step is computed for; 0 for the base alone."""
        return counted(max(self.least_experts, len(set(self.host) - {BASE})), self.slots)

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


def step_sizes(rows: Sequence[int], slots: int, specialized: bool) -> set[tuple[int, int, int]]:
    """(rows, pieces, likely pieces) of steps of so many rows: what kernels depend on. Arguments as of `Side`."""
    counts = expert_counts(slots) if specialized else [slots]
    return {(count, *most_likely(count, experts, PIECE)) for experts in counts for count in rows}


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

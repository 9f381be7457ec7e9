"""Which tokens of a prefill step belong to which expert, known on the host, so that no layer waits for the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from meswitch.ops.restored import on_hopper, tile_table
from meswitch.ops.routing import BASE, MAX_TOKENS, Routing, by_slot

OWN_FROM = 64  # tokens of one expert from which the restoring product costs less than the decode kernel; measured
MERGE_FROM = 256  # from which merging does, where weights can't be restored in the product
LONG_FROM = 4096  # from which merging costs less than the restoring product


@dataclass(frozen=True)
class PrefillRouting:
    """Tokens brought together by slot, in the order in which the slots first appear.

    A step whose tokens lie together already is used as it is, which saves two copies a layer; so a scheduler does well
    to put one expert's requests side by side.

    order: [tokens] int64, where each token of the sorted step comes from; None if it is sorted as it is. own: (first,
    last) token of each segment that gets weights of its own, long ones first. own_slots: [own] int32. long: how many
    are long. tiles: [1 + tiles, 4] int32, the others for `restored.launch`. plain: (first, last) of the other tokens,
    which get the base's weights. short: of these, those with an expert, for the decode kernel in pieces of at most
    `MAX_TOKENS`, or None; positions are of the sorted step. token_slots: what it was built from,
    if `own_from` was left to it.
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
            token_slots: the slot of each token, `BASE` for none. own_from: the fewest tokens of an expert for which it
                gets weights of its own; fewer go to the base's product and the decode kernel. By default what is best
                on the device.
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

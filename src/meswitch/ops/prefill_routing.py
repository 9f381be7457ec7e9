"""Which tokens of a prefill step belong to which expert, known on the host, so that no layer waits for the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.ops.routing import BASE, MAX_TOKENS, Routing, by_slot

MERGE_FROM = 256  # tokens of one expert from which merging its weights costs less than the decode kernel; measured


@dataclass(frozen=True, slots=True)
class PrefillRouting:
    """Tokens brought together by slot, in the order in which the slots first appear.

    A step whose tokens lie together already is used as it is, which saves two copies a layer; so a scheduler does well
    to put one expert's requests side by side.

    order: [tokens] int64, where each token of the sorted step comes from; None if it is sorted as it is. merged:
    (first, last) token of each segment that gets weights of its own. merged_slots: [merged] int32. plain: (first, last)
    of the other tokens, which get the base's weights. short: of these, those with an expert, for the decode kernel in
    pieces of at most `MAX_TOKENS`, or None; positions are of the sorted step.
    """

    order: Tensor | None
    merged: tuple[tuple[int, int], ...]
    merged_slots: Tensor
    plain: tuple[tuple[int, int], ...]
    short: Routing | None

    @classmethod
    def build(
        cls, token_slots: Sequence[int], device: torch.device | str = "cpu", *, merge_from: int = MERGE_FROM
    ) -> "PrefillRouting":
        """Sort a step's tokens.

        Args:
            token_slots: the slot of each token, `BASE` for none. merge_from: the fewest tokens of an expert for which
                its weights are merged; fewer go to the base's product and the decode kernel.
        """
        tokens = by_slot(token_slots)
        order = [position for own in tokens.values() for position in own]
        merged, plain, slots, start, owners = [], [], [], 0, [BASE] * len(order)
        for slot, own in tokens.items():
            span = start, start + len(own)
            start = span[1]
            if slot != BASE and len(own) >= merge_from:
                merged.append(span)
                slots.append(slot)
                continue
            plain.append(span)
            owners[slice(*span)] = [slot] * len(own)
        return cls(
            None if order == list(range(len(order))) else torch.tensor(order).to(device, non_blocking=True),
            tuple(merged),
            torch.tensor(slots, dtype=torch.int32).to(device, non_blocking=True),
            _joined(plain),
            Routing.build(owners, device, piece=MAX_TOKENS) if any(slot != BASE for slot in owners) else None,
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

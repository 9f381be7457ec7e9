"""Which tokens of a step belong to which expert's slot, as the kernels read it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = -1


@dataclass(frozen=True, slots=True)
class Routing:
    """Tokens sorted by slot; the base's tokens come last and are in no segment.

    slots: [experts] int32, -1 for an unused place. starts: [experts + 1] int32, segment e is
    `order[starts[e] : starts[e + 1]]`. order: [tokens] int32, positions in the step. max_tokens: a bound on the tokens
    of one segment. Kernels choose their tiles by `experts` and `max_tokens` and by nothing else of a batch, so a
    token's result does not depend on who shares it.
    """

    slots: Tensor
    starts: Tensor
    order: Tensor
    max_tokens: int

    @classmethod
    def build(
        cls,
        token_slots: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        experts: int | None = None,
        max_tokens: int | None = None,
    ) -> "Routing":
        """Sort a step's tokens.

        Args:
            token_slots: the slot of each token, `BASE` for none. experts, max_tokens: the step's buckets, by default
                the next powers of two.
        """
        tokens = by_slot(token_slots)
        present = sorted(tokens.keys() - {BASE})
        segments = [tokens[own] for own in present]
        experts = experts or bucket(len(present))
        lengths = [len(segment) for segment in segments]
        max_tokens = max_tokens or bucket(max(lengths, default=1), least=8)
        if len(present) > experts or max(lengths, default=0) > max_tokens:
            raise ValueError(
                f"{len(present)} experts of up to {max(lengths)} tokens in a bucket of {experts}, {max_tokens}"
            )
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        starts += [starts[-1]] * (experts - len(present))
        order = [t for segment in segments for t in segment]
        order += tokens.get(BASE, [])
        parts = [[*present, *[BASE] * (experts - len(present))], starts, order]
        padded = [part + [0] * (-len(part) % 4) for part in parts]  # 16-byte aligned, or Triton compiles anew
        flat = torch.tensor([*padded[0], *padded[1], *padded[2]], dtype=torch.int32).to(device)  # one copy
        places = flat.split([len(part) for part in padded])
        slots, begins, positions = (place[: len(part)] for place, part in zip(places, parts, strict=True))
        return cls(slots, begins, positions, max_tokens)


def by_slot(token_slots: Sequence[int]) -> dict[int, list[int]]:
    """The positions of each slot's tokens; slots in the order in which they first appear."""
    tokens: dict[int, list[int]] = {}
    for position, slot in enumerate(token_slots):
        tokens.setdefault(slot, []).append(position)
    return tokens


def bucket(count: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << max(count - 1, 0).bit_length())

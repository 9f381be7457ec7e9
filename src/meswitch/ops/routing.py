"""Which tokens of a step belong to which expert's slot, as the kernels read it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = -1
MAX_TOKENS = 64  # of a piece, and of a step in the fused kernel
PIECE = 8  # tokens that a piece has at most: the least that the matrix unit multiplies at once


@dataclass(frozen=True, slots=True)
class Routing:
    """Tokens sorted by slot and cut into pieces of one slot each; the base's tokens come last and are in no piece.

    slots: [pieces] int32, the slot of each piece, -1 for an unused one. starts: [pieces + 1] int32, piece p is
    `order[starts[p] : starts[p + 1]]`. order: [tokens] int32, positions in the step. piece: a bound on the tokens of
    one. likely: how many of the pieces a step of this size has as a rule, at least 1. Kernels choose their tiles by
    these sizes and by nothing else of a batch, so a token's result does not depend on who shares it; and one expert's
    many tokens do not give those of the others larger tiles.
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
            token_slots: the slot of each token, `BASE` for none. pieces: room for so many, by default for as many as
                there are. piece: tokens that one has at most.

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

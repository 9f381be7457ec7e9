"""What every switchable layer needs to know about the step that runs now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meswitch.codec import PackedDelta
from meswitch.experts import ExpertStore
from meswitch.ops import Backend

BASE_SLOT = -1


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens of one expert. tokens: [n] int64, their positions in the step."""

    slot: int
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class StepContext:
    """segments: by expert, over all tokens of the step; the base's tokens are in none. head_segments: the same over
    the rows that reach the head. row_request: the request of each of these rows."""

    segments: tuple[Segment, ...] = ()
    head_segments: tuple[Segment, ...] = ()
    row_request: tuple[str, ...] = ()

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        requests: Sequence[str],
        slots: Sequence[int],
        rows: Tensor | None,
        padding: int = 0,
    ) -> "StepContext":
        """Lay out a step.

        Args:
            lengths: tokens of each request, in the batch's order. requests, slots: their ids and slots.
            rows: [m] int64, token positions whose logits are wanted; None for all.
            padding: tokens after the last request.
        """
        owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
        token_slot = torch.tensor([*slots, BASE_SLOT])[owners]
        if padding:
            token_slot = torch.cat([token_slot, torch.full((padding,), BASE_SLOT)])
            owners = torch.cat([owners, torch.zeros(padding, dtype=torch.int64)])
        positions = torch.arange(len(owners)) if rows is None else rows.cpu()
        return cls(
            _segments(token_slot, slots),
            _segments(token_slot[positions], slots),
            tuple(requests[i] for i in owners[positions].tolist()),
        )

    def to(self, device: torch.device) -> "StepContext":
        def move(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
            return tuple(Segment(s.slot, s.tokens.to(device, non_blocking=True)) for s in segments)

        return StepContext(move(self.segments), move(self.head_segments), self.row_request)


def _segments(token_slot: Tensor, slots: Sequence[int]) -> tuple[Segment, ...]:
    present = sorted(set(slots) - {BASE_SLOT})
    found = ((slot, (token_slot == slot).nonzero().view(-1)) for slot in present)
    return tuple(Segment(slot, tokens) for slot, tokens in found if len(tokens))


@dataclass(slots=True)
class Switch:
    """Shared by all switchable layers of one model: the step's context, the experts' tensors, the op."""

    store: ExpertStore
    backend: Backend
    step: StepContext = field(default_factory=StepContext)

    def tensors(self, slot: int) -> Mapping[str, PackedDelta | Tensor]:
        return self.store.tensors(slot)

"""What every switchable layer needs to know about the step that runs now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from meswitch.codec import PackedDelta
from meswitch.experts import ExpertStore
from meswitch.ops import Backend, PrefillRouting, Routing, SlotLinear

BASE_SLOT = -1


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens of one expert. tokens: [n] int64, their positions in the step."""

    slot: int
    tokens: Tensor


class Owners:
    """The slot of each row of a step, as the ops take it; each form is made once a step, when a layer first needs it.

    Args:
        slots: [rows] int64, on the host.
    """

    def __init__(self, slots: Tensor, device: torch.device | str = "cpu") -> None:
        self._host, self._device = slots, torch.device(device)

    def to(self, device: torch.device) -> "Owners":
        return Owners(self._host, device)

    @cached_property
    def any(self) -> bool:
        """Whether some row is an expert's."""
        return bool((self._host != BASE_SLOT).any())

    @cached_property
    def slots(self) -> Tensor:
        """[rows] int32, on the device."""
        return self._host.int().to(self._device, non_blocking=True)

    @cached_property
    def present(self) -> list[int]:
        """The slots that own some row, ascending, without the base."""
        return [int(slot) for slot in self._host.unique() if slot != BASE_SLOT]

    @cached_property
    def places(self) -> Tensor:
        """[rows] int64, on the device: 0 for the base's rows, else 1 + the place of the row's slot in `present`."""
        bounds = torch.tensor([BASE_SLOT, *self.present])
        return torch.searchsorted(bounds, self._host).to(self._device, non_blocking=True)

    @cached_property
    def routing(self) -> Routing:
        return Routing.build(self._host.tolist(), self._device)

    @cached_property
    def prefill(self) -> PrefillRouting:
        return PrefillRouting.build(self._host.tolist(), self._device)


@dataclass(frozen=True, slots=True)
class StepContext:
    """segments: by expert, over all tokens of the step; the base's tokens are in none. head_segments: the same over
    the rows that reach the head. owners, head_owners: the same by row. row_request: the request of each of the head's
    rows."""

    segments: tuple[Segment, ...] = ()
    head_segments: tuple[Segment, ...] = ()
    row_request: tuple[str, ...] = ()
    owners: Owners = field(default_factory=lambda: Owners(torch.zeros(0, dtype=torch.int64)))
    head_owners: Owners = field(default_factory=lambda: Owners(torch.zeros(0, dtype=torch.int64)))

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
            Owners(token_slot),
            Owners(token_slot[positions]),
        )

    def head_sees_all(self) -> "StepContext":
        """The same step where every token reaches the head."""
        return replace(self, head_segments=self.segments, head_owners=self.owners)

    def to(self, device: torch.device) -> "StepContext":
        def move(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
            return tuple(Segment(s.slot, s.tokens.to(device, non_blocking=True)) for s in segments)

        owners, head_owners = self.owners.to(device), self.head_owners.to(device)
        if self.head_owners is self.owners:
            head_owners = owners
        return StepContext(move(self.segments), move(self.head_segments), self.row_request, owners, head_owners)


def _segments(token_slot: Tensor, slots: Sequence[int]) -> tuple[Segment, ...]:
    present = sorted(set(slots) - {BASE_SLOT})
    found = ((slot, (token_slot == slot).nonzero().view(-1)) for slot in present)
    return tuple(Segment(slot, tokens) for slot, tokens in found if len(tokens))


@dataclass(slots=True)
class Switch:
    """Shared by all switchable layers of one model: the step's context, the experts' tensors, the op.

    backend: computes packed deltas expert by expert, where they do not lie as the kernels read them.
    """

    store: ExpertStore
    backend: Backend
    step: StepContext = field(default_factory=StepContext)

    def kernel_layer(self, name: str) -> SlotLinear | None:
        """All slots' packed deltas of a tensor, where they lie as the kernels read them."""
        return None if self.store.tables is None else self.store.tables.layers.get(name)

    def tensors(self, slot: int) -> Mapping[str, PackedDelta | Tensor]:
        return self.store.tensors(slot)

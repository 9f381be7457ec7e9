"""What every switchable layer needs to know about the step that runs now."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from meswitch.engine.coded import CodedLinear
from meswitch.engine.parameters import BatchTensors, MergedWeights
from meswitch.engine.tables import LowRankTable, OwnTable, OwnTables
from meswitch.ops import Backend, PrefillRouting, Routing, SlotLinear, expert_prefill, fused_linear, static_prefill
from meswitch.ops.routing import HEAD, MAX_TOKENS, TOKENS, Side, Step
from meswitch.slots import ExpertStore

BASE_SLOT = -1
# What a layer's rows are: all tokens of the step, or those whose logits are wanted.
Rows = Literal["tokens", "logits"]


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one expert. rows: [n] int64, their positions in the step."""

    slot: int
    rows: Tensor


class Owners:
    """The slot of each row of a step, as the ops take it; each form is made once a step, when a layer first needs it.

    Args:
        slots: of each row.
        device: where the forms are.
        side: static buffers that hold these rows, for the kernels; they are of one size for many steps, so that few
            kernels serve them all.
    """

    in_tables = False
    """Whether what experts have of their own is looked up in tables, slot by slot, and never in Python."""

    def __init__(self, slots: Sequence[int], device: torch.device | str = "cpu", side: Side | None = None) -> None:
        self._rows, self._device, self._side = slots, torch.device(device), side
        self._count = len(slots)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _host(self) -> Tensor:
        """[rows] int64, on the host."""
        return torch.tensor(self._rows, dtype=torch.int64)

    def of_base(self) -> "Owners":
        """As many rows, all of them the base's."""
        return Owners([BASE_SLOT] * self._count, self._device)

    @cached_property
    def any(self) -> bool:
        """Whether some row is an expert's."""
        return any(slot != BASE_SLOT for slot, *_ in self._stretches)

    @cached_property
    def slots(self) -> Tensor:
        """[rows] int32, on the device."""
        return self._host.int().to(self._device, non_blocking=True)

    @cached_property
    def present(self) -> list[int]:
        """The slots that own some row, ascending, without the base."""
        return sorted({slot for slot, *_ in self._stretches} - {BASE_SLOT})

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The rows of each expert; the base's are in none."""
        return tuple(
            Segment(slot, (self._host == slot).nonzero().view(-1).to(self._device, non_blocking=True))
            for slot in self.present
        )

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...] | None:
        """Slot, first row and row after the last of each owner, the base too; None if some owner's rows lie apart."""
        found = self._stretches
        return found if len({slot for slot, *_ in found}) == len(found) else None

    @cached_property
    def _stretches(self) -> tuple[tuple[int, int, int], ...]:
        """Rows of one slot side by side: the slot, the first row, and that after the last."""
        found, start = [], 0
        for slot, rows in itertools.groupby(self._rows):
            end = start + sum(1 for _ in rows)
            found.append((slot, start, end))
            start = end
        return tuple(found)

    @cached_property
    def sole(self) -> int | None:
        """The slot that all rows belong to, `BASE_SLOT` for the base; None if several own some."""
        return self.runs[0][0] if self.runs is not None and len(self.runs) == 1 else None

    def by_owner(self, x: Tensor, compute: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Compute each owner's rows on their own.

        Args:
            x: [rows, ...].
            compute: an owner's slot, `BASE_SLOT` for the base, and its rows of x -> as many rows, of one width for all.
        """
        if self.runs is not None:
            if self.sole is not None:
                return compute(self.sole, x)
            return torch.cat([compute(slot, x[start:end]) for slot, start, end in self.runs])
        rows = {segment.slot: segment.rows for segment in self.segments}
        rows[BASE_SLOT] = (self._host == BASE_SLOT).nonzero().view(-1).to(self._device)
        parts = [compute(slot, x[own]) for slot, own in rows.items() if len(own)]
        return torch.cat(parts)[torch.cat(list(rows.values())).argsort()]

    @cached_property
    def places(self) -> Tensor:
        """[rows] int64, on the device: 0 for the base's rows, else 1 + the place of the row's slot in `present`."""
        bounds = torch.tensor([BASE_SLOT, *self.present])
        return torch.searchsorted(bounds, self._host).to(self._device, non_blocking=True)

    @cached_property
    def routing(self) -> Routing:
        found = self._side.routing(self._count) if self._side is not None and self._count <= MAX_TOKENS else None
        return Routing.build(list(self._rows), self._device) if found is None else found

    @cached_property
    def prefill(self) -> PrefillRouting:
        return PrefillRouting.build(list(self._rows), self._device)


class TableOwners(Owners):
    """The slots of a step's rows in static buffers, which a captured graph reads again in every replay.

    Args:
        side: the buffers.
        rows: of the step, with padding, which is the base's.
    """

    in_tables = True

    def __init__(self, side: Side, rows: int) -> None:
        super().__init__([BASE_SLOT] * rows, side.token_slots.device, side)
        self.slots = side.token_slots[:rows]
        self.any = side.active

    @cached_property
    def static(self) -> tuple[Routing, Routing, Tensor | None]:
        """Of more rows than the fused kernel takes; as `StaticRouting.part`."""
        assert self._side is not None
        return self._side.static(self._count)


def _nobody() -> Owners:
    return Owners([])


@dataclass(frozen=True, slots=True)
class StepContext:
    """Who owns what in a step.

    Args:
        owners: by token. logit_owners: by row that reaches the head.
    """

    owners: Owners = field(default_factory=_nobody)
    logit_owners: Owners = field(default_factory=_nobody)

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int] | None,
        device: torch.device | str = "cpu",
        step: Step | None = None,
    ) -> "StepContext":
        """Lay out a step.

        Args:
            lengths: tokens of each request, in the batch's order.
            slots: their slots.
            positions: of the tokens whose logits are wanted; None for all.
            device: where the layers compute.
            step: the static buffers of the kernels, which are filled.
        """
        by_token = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
        of_logits = by_token if positions is None else [by_token[i] for i in positions]
        if step is None:
            return cls(Owners(by_token, device), Owners(of_logits, device))
        step.tokens.fill(by_token)
        step.head.fill(of_logits)
        return cls(Owners(by_token, device, step.sides[TOKENS]), Owners(of_logits, device, step.sides[HEAD]))

    def rows(self, kind: Rows) -> Owners:
        return self.owners if kind == "tokens" else self.logit_owners

    def of_base(self) -> "StepContext":
        """The same step, as if every row were the base's."""
        return StepContext(self.owners.of_base(), self.logit_owners.of_base())


class Switch:
    """Shared by all switchable layers of one model: the step that runs now, the experts' tensors, the op."""

    def __init__(self) -> None:
        self.alone: Mapping[str, Tensor | None] | None = None
        """Merged weights of the expert that owns all rows of the step, by stored name; those that are made already."""
        self._step = StepContext()
        self.merged: MergedWeights | None = None
        self._store: ExpertStore | None = None
        self._backend: Backend | None = None
        self.tables: OwnTables | None = None
        """What experts have of their own beside deltas, slot by slot, if every layer can look it up there."""

        self.buffers: Step | None = None
        """Where the kernels read whose rows are where; None if they do not run."""

    def connect(
        self, store: ExpertStore, backend: Backend, merged: MergedWeights | None = None, buffers: Step | None = None
    ) -> None:
        """Say where the experts are.

        Args:
            store: holds their tensors in slots.
            buffers: for the kernels, if they compute.
            backend: computes packed deltas expert by expert, where they do not lie as the kernels read them.
            merged: keeps weights of their own for experts in slots; None computes every step from the deltas.
        """
        self._store, self._backend, self.merged, self.buffers = store, backend, merged, buffers

    @property
    def step(self) -> StepContext:
        """The step that runs now."""
        return self._step

    @step.setter
    def step(self, step: StepContext) -> None:
        self._step, self.alone = step, None
        if self.merged is not None and not step.owners.in_tables:
            self.merged.begin({slot: self.tensors(slot) for slot in step.owners.present})
            if step.owners.sole not in (None, BASE_SLOT):
                self.alone = self.merged.made(step.owners.sole)

    @property
    def backend(self) -> Backend:
        assert self._backend is not None
        return self._backend

    def kernel_layer(self, name: str) -> SlotLinear | None:
        """All slots' packed deltas of a tensor, where they lie as the kernels read them."""
        assert self._store is not None
        return None if self._store.tables is None else self._store.tables.layers.get(name)

    def own(self, slot: int, name: str, base: Tensor, *, transposed: bool = False) -> Tensor | None:
        """An expert's merged tensor, as `MergedWeights.weight`; there have to be some."""
        assert self.merged is not None
        return self.merged.weight(slot, name, base, transposed)

    def table(self, name: str | None) -> OwnTable | None:
        """The table of a tensor, None where no expert has one."""
        assert self.tables is not None
        return None if name is None else self.tables.get(name)

    def low_rank(self, name: str) -> LowRankTable | None:
        """The table of a matrix's low-rank deltas, None where no expert has one."""
        assert self.tables is not None
        return self.tables.get_low_rank(name)

    def tensors(self, slot: int) -> BatchTensors:
        assert self._store is not None
        return cast(BatchTensors, self._store.tensors(slot))


TRITON = "triton"


def base_with_deltas(x: Tensor, base: Any, bias: Tensor | None, layer: SlotLinear | None, owners: Owners) -> Tensor:
    """A linear layer, with packed deltas where there are some: [rows, in_features] -> [rows, out_features].

    Args:
        base: the base's layer.
        layer: None if no expert changes it.
    """
    if layer is not None and owners.any:
        return product_with_deltas(x, base, bias, layer, owners)
    if isinstance(base, CodedLinear):
        return base.product(x, bias)
    return nn.functional.linear(x, base.weight, bias)


def product_with_deltas(x: Tensor, base: Any, bias: Tensor | None, layer: SlotLinear, owners: Owners) -> Tensor:
    """`x W^T + x D^T + bias`, each row with its owner's D: [rows, in_features] -> [rows, out_features].

    Up to 64 rows base and deltas are one launch, which reads each weight once. With more, cuBLAS computes the base, and
    experts of many rows get weights of their own (`ops.prefill`); a layer that is held as codes is restored for it.

    Args:
        base: the base's layer.
    """
    coded = isinstance(base, CodedLinear)
    if len(x) <= MAX_TOKENS:
        return fused_linear(x, base.held if coded else base.weight, layer, owners.routing, bias, backend=TRITON)
    weight = base.restored if coded else base.weight
    if isinstance(owners, TableOwners):
        return static_prefill(x, weight, layer, owners.static, bias, backend=TRITON)
    return expert_prefill(x, weight, layer, owners.prefill, bias, backend=TRITON)

"""Experts' weights as merged models have them, made once and kept while their experts are used.

Where the kernels of a GPU do not run, a step restores every delta of every expert that has rows in it: most of what a
step of a small model costs. With room for base + delta beside the base, each expert's rows take a plain product with
weights of their own instead. They are what `meswitch merge` computes, in the base's dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from meswitch.codec import Delta
from meswitch.engine.parameters import ExpertParameters, merged

SHARE = 0.5  # of the memory that is free when an engine opens, by default
_RESTS = 16  # steps without rows after which an expert's weights may go, and refused ones are tried again

Tensors = Mapping[str, Delta | Tensor]


@dataclass(slots=True)
class _Kept:
    """What is kept of one slot.

    Args:
        tensors: the expert that the slot held then: another object after every load.
        weights: by stored name, None for one that found no room.
        modules: the same of whole modules, by the module's name.
        shared: by the expert's own tensor and the base's: an embedding and its tied head are one.
        nbytes: of all of them.
        used: step of the last use.
    """

    tensors: Tensors
    weights: dict[str, Tensor | None] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor] | None] = field(default_factory=dict)
    shared: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    nbytes: int = 0
    used: int = 0


class MergedWeights:
    """Merged weights of the experts in slots, within a budget.

    What is kept goes when its slot gets another expert, or when others need the room and its expert has had no rows for
    some steps: the least recently used first. Experts that run never push each other out: what finds no room is
    computed from its delta.

    Args:
        budget: bytes, at most.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._slots: dict[int, _Kept] = {}
        self._step = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return sum(kept.nbytes for kept in list(self._slots.values()))

    def begin(self, slots: Mapping[int, Tensors]) -> None:
        """A step begins.

        Args:
            slots: those with rows in it -> the tensors of the experts that they hold.
        """
        self._step += 1
        for slot, tensors in slots.items():
            kept = self._slots.get(slot)
            if kept is None or kept.tensors is not tensors:
                self._slots[slot] = kept = _Kept(tensors)
            if self._step % _RESTS == 0:
                kept.weights = {name: weight for name, weight in kept.weights.items() if weight is not None}
                kept.modules = {name: own for name, own in kept.modules.items() if own is not None}
            kept.used = self._step

    def weight(self, slot: int, name: str, base: Tensor, transposed: bool = False) -> Tensor | None:
        """An expert's tensor in place of the base's: the base's own where the expert does not change it.

        Args:
            slot: one of the running step's.
            name: under which experts store the tensor.
            base: the base's tensor. transposed: deltas lie the other way round.

        Returns:
            None if there is no room for it.
        """
        kept = self._slots[slot]
        try:
            return kept.weights[name]
        except KeyError:
            weight = kept.weights[name] = self._made(kept, name, base, transposed)
            return weight

    def made(self, slot: int) -> Mapping[str, Tensor | None]:
        """What `weight` has given so far for a slot of the running step; what it gives later is there too."""
        return self._slots[slot].weights

    def parameters(
        self, slot: int, name: str, module: nn.Module, parameters: ExpertParameters
    ) -> dict[str, Tensor] | None:
        """What an expert has instead of a module's parameters: empty where it changes none, None if there is no room.

        Args:
            name: the module's. parameters: make them.
        """
        kept = self._slots[slot]
        if name not in kept.modules:
            own = parameters.own(module, kept.tensors)
            nbytes = sum(tensor.nbytes for tensor in own.values())
            kept.modules[name] = own if self._take(kept, nbytes) else None
        return kept.modules[name]

    def _made(self, kept: _Kept, name: str, base: Tensor, transposed: bool) -> Tensor | None:
        own = kept.tensors.get(name)
        if own is None:
            return base
        if isinstance(own, Tensor) and own.dtype == base.dtype:
            return own
        key = (id(own), base.data_ptr())
        if key in kept.shared:
            return kept.shared[key]
        rows = base.shape[0] if isinstance(own, Tensor) or own.extra is None else len(base) + len(own.extra)
        nbytes = own.numel() * base.itemsize if isinstance(own, Tensor) else base.nbytes // len(base) * rows
        if not self._take(kept, nbytes):
            return None
        with torch.no_grad():
            made = merged(base.detach(), own, transposed=transposed).contiguous()
        kept.nbytes += made.nbytes - nbytes
        kept.shared[key] = made
        return made

    def _take(self, kept: _Kept, nbytes: int) -> bool:
        """Find room for so many bytes more of a slot, for which those that do not run may go."""
        if nbytes > self.budget:
            return False
        while self.nbytes + nbytes > self.budget:
            idle = [slot for slot, other in self._slots.items() if other.used <= self._step - _RESTS]
            if not idle:
                return False
            del self._slots[min(idle, key=lambda slot: self._slots[slot].used)]
        kept.nbytes += nbytes
        return True

"""What an expert's tensors make of the base's parameters: base + delta, by the rules that transformers loads with.

Where the kernels of a GPU do not run, a step restores every delta of every expert that has rows in it: most of what a
step of a small model costs. With room for merged weights beside the base (`MergedWeights`), each expert's rows take a
plain product with weights of their own instead. They are what `meswitch merge` computes, in the base's dtype.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from meswitch.architecture import LIE_TRANSPOSED, LINEAR, TRANSPOSED, Architecture, Conversion, LoadPlan, from_matrix
from meswitch.artifact import Artifact
from meswitch.checkpoint import Checkpoint
from meswitch.codec import Delta, ExactDelta
from meswitch.errors import IncompatibleError
from meswitch.slots.tiers import Tensors

_RESTS = 16  # steps without rows after which an expert's weights may go, and refused ones are tried again

BatchTensors = Mapping[str, Delta | Tensor]  # as `Tensors`; exact changes are never in a batch (`engine.runner`)


@dataclass(frozen=True)
class StoredTensors:
    """All tensors that some expert of a family stores, and the base's parameters that they become.

    Args:
        architecture: the base's.
        plan: how the stored names are loaded.
        shapes: stored name -> shape, of an expert with added tokens the base's rows only where it is packed.
        changed: stored names that some expert changes.
        transposed: stored names whose delta lies the other way round than the parameter.
        tied: names that an expert need not store -> the tensor that they share then.
        base: the base's checkpoint.
    """

    architecture: Architecture
    plan: LoadPlan
    shapes: Mapping[str, tuple[int, ...]]
    changed: frozenset[str]
    transposed: frozenset[str]
    tied: Mapping[str, str]
    base: Checkpoint

    @classmethod
    def of(cls, architecture: Architecture, base: Checkpoint, artifacts: Iterable[Artifact]) -> "StoredTensors":
        """Gather what a family's artifacts store.

        Raises:
            IncompatibleError: two artifacts store one tensor in two ways that cannot be served together.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        changed: set[str] = set()
        roles: dict[str, tuple[str, Artifact]] = {}
        for artifact in artifacts:
            for name, entry in artifact.manifest.tensors.items():
                shapes[name] = entry.shape
                if entry.kind == "same":
                    continue
                changed.add(name)
                role, other = roles.setdefault(name, (entry.role, artifact))
                if entry.kind == "packed" and (role in LIE_TRANSPOSED) != (entry.role in LIE_TRANSPOSED):
                    raise IncompatibleError(
                        f"{artifact.directory}: {name}: its delta lies the other way round than that of "
                        f"{other.directory}; compress both with this version"
                    )
        transposed = frozenset(name for name, (role, _) in roles.items() if role in LIE_TRANSPOSED)
        # a tied head is stored nowhere, or by the experts that untied it: it has a name of its own here
        own = architecture.load_plan(shapes)
        given = {target for name in shapes for target in own.parameters_of(name)}
        plan = architecture.load_plan([*shapes, *(set(architecture.tied) - given)])
        names = {target: name for name in plan.by_source for target in plan.parameters_of(name)}
        tied = {names[target]: names[source] for target, source in architecture.tied.items() if source in names}
        for name, source in tied.items():
            shapes.setdefault(name, shapes[source])
            if source in changed:
                changed.add(name)
        return cls(architecture, plan, shapes, frozenset(changed), transposed, tied, base)

    def changed_parameters(self) -> dict[str, list[str]]:
        """Parameters that some expert changes -> the stored tensors that do."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.changed):
            for target in self.plan.parameters_of(name):
                found.setdefault(target, []).append(name)
        return found

    def of_module(self, path: str, name_inside: Callable[[str], str]) -> "ExpertParameters":
        """The parameters of a module and those inside it.

        Args:
            path: the module's name in the base; "" for the whole model.
            name_inside: a parameter's name in the base -> its name in the module as it is now.
        """
        prefix = f"{path}." if path else ""
        rules = []
        for conversion in self.plan.conversions:
            mine = [target for target in conversion.targets if target.startswith(prefix)]
            if mine and not self.changed.isdisjoint(conversion.sources):
                rules.append((conversion, {target: name_inside(target) for target in mine}))
        return ExpertParameters(self, rules)


@dataclass(frozen=True)
class ExpertParameters:
    """The parameters of one module, as each expert has them.

    Args:
        stored: the family's tensors.
        rules: conversions with the parameters that are wanted of them: name in the base -> name in the module.
    """

    stored: StoredTensors
    rules: Sequence[tuple[Conversion, Mapping[str, str]]]
    _pieces: dict[str, Tensor] = field(default_factory=dict)

    def own(self, module: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
        """What differs from the base: name in the module -> value in the parameter's dtype.

        Args:
            module: holds the base's values.
            tensors: the expert's.
        """
        found: dict[str, Tensor] = {}
        for conversion, wanted in self.rules:
            if any(name in tensors for name in conversion.sources):
                found |= self._made(module, conversion, wanted, tensors)
        return found

    def _made(
        self, module: nn.Module, conversion: Conversion, wanted: Mapping[str, str], tensors: Tensors
    ) -> dict[str, Tensor]:
        if conversion.renames:
            (name,), (inside,) = conversion.sources, wanted.values()
            base = _tensor(module, inside)
            own = self._given(name, tensors[name], base.device)
            return {inside: merged(base, own, transposed=name in self.stored.transposed)}

        def change(name: str) -> Tensor:
            device = next(iter(_tensor(module, inside) for inside in wanted.values())).device
            if name not in tensors:
                return torch.zeros(self.stored.shapes[name], device=device)
            given = self._given(name, tensors[name], device)
            if isinstance(given, Delta):
                role = TRANSPOSED if name in self.stored.transposed else LINEAR
                return from_matrix(given.dequantize(), self.stored.shapes[name], role)
            if name not in self._pieces:
                self._pieces[name] = self.stored.base.read(name)
            return given.float() - self._pieces[name].to(device).float()

        # transformers' rules stack, join, split and transpose: what they make of a change is the change of what they
        # make
        changes = conversion.build(change, self.stored.architecture.model)
        return {
            inside: (_tensor(module, inside).float() + changes[target]).to(_tensor(module, inside).dtype)
            for target, inside in wanted.items()
        }

    def _given(self, name: str, own: Delta | ExactDelta | Tensor, device: torch.device) -> Delta | Tensor:
        """What an expert stores of a tensor, an exact change as the tensor that it makes of the base's."""
        if not isinstance(own, ExactDelta):
            return own
        # the model may have rounded the base's, so the checkpoint is read
        return own.restore(self.stored.base.read(name), name).to(device)


def merged(base: Tensor, own: Delta | Tensor, *, transposed: bool = False) -> Tensor:
    """The base's tensor as an expert has it, in the base's dtype.

    Args:
        base: of any shape.
        own: the expert's delta, as a matrix [rows, columns] whose rows are all dimensions but the last, with rows for
            added tokens; or the expert's own values.
        transposed: a delta is [columns, rows], in a stack each of its matrices.
    """
    if isinstance(own, Tensor):
        return own.to(base.dtype)
    delta = own.dequantize()
    if transposed:
        delta = from_matrix(delta, tuple(base.shape), TRANSPOSED)
    if own.extra is None:
        known = base if base.dim() != 2 else base[: len(delta)]
        return (known.float() + delta.view(known.shape)).to(base.dtype)
    return torch.cat([(base.float() + delta).to(base.dtype), own.extra.to(base.dtype)])


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    found = getattr(module.get_submodule(path) if path else module, leaf)
    assert isinstance(found, Tensor)
    return found


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

    tensors: BatchTensors
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

    def begin(self, slots: Mapping[int, BatchTensors]) -> None:
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

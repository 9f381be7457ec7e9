"""Turning a loaded base model into one that can switch experts, module by module.

`Survey` sees how the modules are called in a step of the running batch: which dimension holds the rows. A module does
not say it: a norm may see [1, tokens, heads, width] or, after heads and tokens were swapped, [1, heads, tokens, width].
Steps of different sizes do: the dimension that has as many places as the step has tokens in each of them is that of the
tokens.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from meswitch.engine.coded import CodedLinear
from meswitch.engine.context import Rows, Switch
from meswitch.engine.joined import Joined
from meswitch.engine.layers import (
    Seen,
    Switchable,
    SwitchableEmbedding,
    SwitchableHead,
    SwitchableLayerNorm,
    SwitchableLinear,
    SwitchableModule,
    SwitchableNorm,
    scales_row_by_row,
)
from meswitch.engine.parameters import ExpertParameters, StoredTensors

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a module: the step's tokens and rows of logits, the shapes that went in and came out.

    source: the first tensor that went in; of one step, two calls with the same were given the very same.
    """

    step: int
    source: int
    tokens: int
    logits: int
    inputs: tuple[tuple[int, ...], ...]
    dtype: torch.dtype | None
    outputs: tuple[tuple[int, ...], ...]
    is_plain: bool  # arguments are tensors and numbers only

    def count(self, rows: Rows) -> int:
        return self.tokens if rows == "tokens" else self.logits


class Survey:
    """Watches a model's modules while steps run, in a `with` block.

    Args:
        model: the base, nothing wrapped.
        switch: its step tells how many rows there are.
    """

    def __init__(self, model: nn.Module, switch: Switch) -> None:
        self._model, self._switch = model, switch
        self._calls: dict[str, list[_Call]] = {}
        self._steps = 0
        self._given: dict[int, Tensor] = {}  # of this step, so that no two tensors have one id

    def __enter__(self) -> "Survey":
        self._handles = [self._model.register_forward_pre_hook(self._count)]
        for name, module in self._model.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(self._noting(name), with_kwargs=True))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._given = {}

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._steps += 1
        self._given = {}

    def _noting(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            step = self._switch.step
            leaves = pytree.tree_leaves((args, kwargs))
            given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            made = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            self._given |= {id(tensor): tensor for tensor in given[:1]}
            call = _Call(
                self._steps,
                id(given[0]) if given else 0,
                len(step.owners),
                len(step.logit_owners),
                tuple(tuple(tensor.shape) for tensor in given),
                given[0].dtype if given else None,
                tuple(tuple(tensor.shape) for tensor in made),
                all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves),
            )
            self._calls.setdefault(name, []).append(call)

        return note

    def seen(self, name: str) -> Seen | str:
        """How a module was called, or why its rows cannot be told apart."""
        calls = self._calls.get(name, [])
        if {call.step for call in calls} != set(range(1, self._steps + 1)):
            return "it is not called in every step" if calls else "it is not called: another module reads its weights"
        if not all(call.is_plain for call in calls):
            return "it is given more than tensors: what it computes does not depend on its rows alone"
        if len({(len(call.inputs), len(call.outputs)) for call in calls}) != 1 or not calls[0].inputs:
            return "it is called in several ways"
        for rows in ("tokens", "logits"):
            found = _axes(calls, rows)
            if found is not None:
                inputs, outputs = found
                dtype = calls[0].dtype or torch.float32
                return Seen(rows, inputs, outputs, (calls[0].inputs[0], dtype))
        return "none of its dimensions, or more than one, is that of the step's tokens"

    def idle(self, name: str) -> str | None:
        """The largest part of the model around a module in which nothing was called, such as a tower for images."""
        found = None
        while name and not any(other == name or other.startswith(f"{name}.") for other in self._calls):
            found = name
            name = name.rpartition(".")[0]
        return found

    def output_axes(self, name: str) -> tuple[Rows, tuple[int | None, ...]] | None:
        """What a module's outputs have as rows, and where; None if no output has them."""
        calls = self._calls.get(name, [])
        kinds: Sequence[Rows] = ("tokens", "logits")
        for rows in kinds:
            places = tuple(_axis([(call.outputs[i], call.count(rows)) for call in calls]) for i in range(_width(calls)))
            if any(place is not None for place in places):
                return rows, places
        return None

    def flat(self, name: str) -> bool:
        """Whether a module's one input is rows x features, with dimensions of size 1 before them at most."""
        calls = self._calls.get(name, [])
        seen = self.seen(name)
        if isinstance(seen, str) or len(seen.inputs) != 1 or len(seen.outputs) != 1:
            return False
        return all(
            torch.Size(shape[:-1]).numel() == call.count(seen.rows)
            for call in calls
            for shape in (call.inputs[0], call.outputs[0])
        )

    def same_input(self, names: Iterable[str]) -> list[list[str]]:
        """Which of some modules were given the very same tensor in every step: groups of two and more, as called."""
        groups: dict[tuple[tuple[int, int], ...], list[str]] = {}
        wanted = set(names)
        for name, calls in self._calls.items():
            if name in wanted:
                groups.setdefault(tuple((call.step, call.source) for call in calls), []).append(name)
        return [group for group in groups.values() if len(group) > 1]

    @property
    def steps(self) -> int:
        return self._steps


def _width(calls: Sequence[_Call]) -> int:
    return min((len(call.outputs) for call in calls), default=0)


def _axes(calls: Sequence[_Call], rows: Rows) -> tuple[tuple[int | None, ...], tuple[int, ...]] | None:
    inputs = tuple(_axis([(call.inputs[i], call.count(rows)) for call in calls]) for i in range(len(calls[0].inputs)))
    outputs = tuple(_axis([(call.outputs[i], call.count(rows)) for call in calls]) for i in range(_width(calls)))
    known = tuple(axis for axis in outputs if axis is not None)
    if all(axis is None for axis in inputs) or len(known) < len(outputs) or not outputs:
        return None
    return inputs, known


def _axis(shapes: Sequence[tuple[tuple[int, ...], int]]) -> int | None:
    """The one dimension that has as many places as there are rows, in every call."""
    common: set[int] | None = None
    for shape, count in shapes:
        here = {place for place, size in enumerate(shape) if size == count}
        common = here if common is None else common & here
    return next(iter(common)) if common is not None and len(common) == 1 else None


def own_parameters(module: nn.Module) -> Mapping[str, Tensor]:
    """Parameters and buffers of a module without those inside it."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


_Make = Callable[[Switch], Switchable]


@dataclass(frozen=True)
class Attachment:
    """What is to be wrapped in a model, before anything is.

    Args:
        wraps: module name -> makes its wrapper.
        joined: modules that are given the same input, as they are called.
        kernel: stored names whose deltas the GPU kernels may compute.
        reasons: why some expert cannot be switched in this model, a line for each module; empty if all can.
        idle: parts of the model that were not called at all, such as a tower for images: what experts change there
            does not matter, if it is proven that text needs none of it.
    """

    wraps: Mapping[str, _Make]
    joined: Sequence[Sequence[str]]
    kernel: frozenset[str]
    reasons: tuple[str, ...]
    idle: tuple[str, ...]

    def apply(self, model: Any, switch: Switch) -> None:
        """Wrap; the model is changed in place."""
        for name, make in self.wraps.items():
            _replace(model, name, make(switch))
        for names in self.joined:
            layers = [model.get_submodule(name) for name in names]
            Joined.join([one for one in layers if isinstance(one, SwitchableLinear) and not one.transposed])

    def undo(self, model: Any) -> None:
        """Give the model its own modules back."""
        for name in self.wraps:
            module = model.get_submodule(name)
            if isinstance(module, Switchable):
                _replace(model, name, module.base)

    def name_inside(self, unit: str) -> Callable[[str], str]:
        """For a module of the wrapped model: a parameter's name in the base -> its name in that module."""

        def rename(parameter: str) -> str:
            owner = next((name for name in self.wraps if parameter.startswith(f"{name}.")), None)
            if owner is not None:
                parameter = f"{owner}.base{parameter.removeprefix(owner)}"
            return parameter.removeprefix(f"{unit}.") if unit else parameter

        return rename


def plan_attachment(model: Any, stored: StoredTensors, survey: Survey, vocabulary: int) -> Attachment:
    """Choose a switchable layer for every module that some expert changes.

    Args:
        model: the base, nothing wrapped.
        stored: what the experts store.
        survey: how the modules are called.
        vocabulary: tokens of the largest expert.
    """
    modules = dict(model.named_modules())
    changed = stored.changed_parameters()
    owners: dict[str, dict[str, list[str]]] = {}
    for parameter, names in changed.items():
        path, _, leaf = parameter.rpartition(".")
        owners.setdefault(path, {})[leaf] = names
    architecture = stored.architecture
    grows = vocabulary != modules[architecture.embedding].weight.shape[0]
    if grows:
        for path in (architecture.embedding, architecture.head):
            owners.setdefault(path, {})
    chosen: dict[str, _Make] = {}
    whole: set[str] = set()  # modules that are run again for each expert
    kernel: set[str] = set()
    refused: dict[str, list[str]] = {}  # reason -> modules
    idle: set[str] = set()
    for path, leaves in owners.items():
        if (part := survey.idle(path)) is not None:
            idle.add(part)
            continue
        simple = {leaf: names[0] for leaf, names in leaves.items() if len(names) == 1}
        renamed = all(len(names) == 1 and stored.plan.by_source[names[0]].renames for names in leaves.values())
        make = _simple(path, modules[path], simple, stored, survey, vocabulary, kernel) if renamed else None
        if make is not None:
            chosen[path] = make
            continue
        if grows and path in (architecture.embedding, architecture.head):
            why = "experts with added tokens need a plain table and a plain linear head"
            refused.setdefault(f"a {type(modules[path]).__name__}: {why}", []).append(path)
            continue
        found, why = _whole(path, survey)
        if found is None:
            refused.setdefault(f"a {type(modules[path]).__name__}: {why}", []).append(path)
        else:
            whole.add(found)
    outer = {path for path in whole if not any(path.startswith(f"{other}.") for other in whole if other != path)}
    for path in list(chosen):
        if any(path.startswith(f"{other}.") for other in outer):
            del chosen[path]
    chosen |= {path: _again(path, modules[path], stored, survey) for path in outer}
    reasons = tuple(
        f"{paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''}: {why}" for why, paths in refused.items()
    )
    return Attachment(chosen, survey.same_input(chosen), frozenset(kernel), reasons, tuple(sorted(idle)))


def _simple(
    path: str,
    module: nn.Module,
    names: Mapping[str, str],
    stored: StoredTensors,
    survey: Survey,
    vocabulary: int,
    kernel: set[str],
) -> _Make | None:
    """The layer for a module that is known exactly, None if it is not. kernel: gets the names that it may compute."""
    seen, architecture = survey.seen(path), stored.architecture
    if isinstance(seen, str) or "forward" in vars(module):
        return None
    exact = type(module).forward
    is_flat = survey.flat(path)
    if exact in (nn.Linear.forward, CodedLinear.forward) and is_flat and set(names) <= {"weight", "bias"}:
        weight = _stored_name(stored, f"{path}.weight")
        kernel.add(weight)
        if path == architecture.head:
            bias = _stored_name(stored, f"{path}.bias")
            return _make(SwitchableHead, module, path, seen, weight=weight, bias=bias, vocabulary=vocabulary)
        return _make(SwitchableLinear, module, path, seen, weight=weight, bias=names.get("bias"))
    if exact is Conv1D.forward and is_flat and set(names) <= {"weight", "bias"}:
        weight = _stored_name(stored, f"{path}.weight")
        # of artifacts whose deltas lie as the parameter does, the module is run again for each expert
        if "weight" not in names or weight in stored.transposed:
            return _make(SwitchableLinear, module, path, seen, weight=weight, bias=names.get("bias"), transposed=True)
        return None
    if isinstance(module, nn.Embedding) and len(seen.inputs) == 1 and set(names) <= {"weight"}:
        weight = _stored_name(stored, f"{path}.weight")
        if not _takes_ids(seen):
            return None
        kernel.add(weight)
        added = vocabulary - len(module.weight) if path == architecture.embedding else 0
        return _make(SwitchableEmbedding, module, path, seen, weight=weight, added=added)
    if isinstance(module, nn.LayerNorm) and exact is nn.LayerNorm.forward and set(names) <= {"weight", "bias"}:
        if seen.rows_before(len(module.normalized_shape)) is None:
            return None
        return _make(SwitchableLayerNorm, module, path, seen, parameters=_own_rules(stored, path), stored=names)
    if len(names) == 1 and list(own_parameters(module)) == list(names):
        ((leaf, name),) = names.items()
        if leaf in dict(module.named_parameters()) and scales_row_by_row(module, leaf, seen):
            return _make(SwitchableNorm, module, path, seen, parameter=leaf, stored=name)
    return None


def _takes_ids(seen: Seen) -> bool:
    """Whether a module is given token ids, one a row."""
    shape, dtype = seen.example
    axis = seen.inputs[0]
    return not dtype.is_floating_point and axis is not None and shape[axis] == math.prod(shape)


def _stored_name(stored: StoredTensors, parameter: str) -> str:
    """The name under which experts store a parameter; its own if none does."""
    names = [name for name, rule in stored.plan.by_source.items() if rule.targets == (parameter,)]
    return names[0] if names else parameter


def _make(kind: type[Any], module: nn.Module, path: str, seen: Seen, **names: Any) -> _Make:
    return lambda switch: kind(module, path, switch, seen, **names)


def _again(path: str, module: nn.Module, stored: StoredTensors, survey: Survey) -> _Make:
    seen = survey.seen(path)
    assert isinstance(seen, Seen)
    return _make(SwitchableModule, module, path, seen, parameters=_own_rules(stored, path))


def _own_rules(stored: StoredTensors, path: str) -> ExpertParameters:
    """What experts' tensors make of a module's own parameters."""
    return stored.of_module(path, lambda name: name.removeprefix(f"{path}."))


def _whole(path: str, survey: Survey) -> tuple[str | None, str]:
    """The smallest module around a parameter that can be run for some rows alone, and why the innermost cannot."""
    reason = ""
    inside = path
    while inside:
        found = survey.seen(inside)
        if isinstance(found, Seen):
            return inside, reason
        reason = reason or found
        inside = inside.rpartition(".")[0]
    return None, reason


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)

"""How the modules of a model are called in a step of the running batch: which dimension holds the rows.

A module does not say it: a norm may see [1, tokens, heads, width] or, after heads and tokens were swapped, [1, heads,
tokens, width]. Steps of different sizes do: the dimension that has as many places as the step has tokens in each of
them is that of the tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from meswitch.engine.context import Rows, Switch
from meswitch.engine.layers import Seen

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a module: the step's tokens and rows of logits, the shapes that went in and came out."""

    step: int
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

    def __enter__(self) -> "Survey":
        self._handles = [self._model.register_forward_pre_hook(self._count)]
        for name, module in self._model.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(self._noting(name), with_kwargs=True))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._steps += 1

    def _noting(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            step = self._switch.step
            leaves = pytree.tree_leaves((args, kwargs))
            given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            made = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            call = _Call(
                self._steps,
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

"""Dry steps: the model computes a few tokens before it serves any, and shows how its layers are called.

A delta is right only where the model reads a layer's weights through the layer, and where it is known which row of an
input belongs to which token. Both are measured: two steps differ in some tokens, and the rows that differ are those
tokens' rows.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meswitch.vllm import compat
from meswitch.vllm.places import EMBEDDING, FUSED, HEAD, NORM, Place, Unserved

TOKENS = 7  # of a dry step
_CHANGED = (1, 4)  # tokens in which two of them differ
LOOK_UP, MULTIPLY, NORMALISE = "look up", "multiply", "normalise"


@dataclass(slots=True)
class Call:
    """One use of a layer.

    Args:
        use: what is done with its weights.
        inputs: copies of the tensors that it was given.
    """

    use: str
    inputs: tuple[Tensor | None, ...]

    @property
    def x(self) -> Tensor:
        """The input proper."""
        x = self.inputs[0]
        assert x is not None
        return x


@dataclass(frozen=True, slots=True)
class SeenLayer:
    """What dry steps showed of a model.

    Args:
        places: layers whose deltas can be served, with the axis of their tokens.
        unserved: the others of those that were looked at.
        calls: by layer, the calls of one step.
        logits: of that step, None on a rank that computes none.
    """

    places: list[Place]
    unserved: list[Unserved]
    calls: Mapping[str, list[Call]]
    logits: Tensor | None


class DryStep:
    """Steps of `TOKENS` tokens, computed by the model as it stands, without a cache and without compiled code.

    Args:
        model: vLLM's.
        config: vLLM's.
        device: where it computes.
        rows: how many of the tokens get logits.
    """

    def __init__(self, model: Any, config: Any, device: torch.device) -> None:
        self._model, self._config, self._device = model, config, device
        self.rows = min(TOKENS, config.scheduler_config.max_num_seqs)
        self._vocabulary = config.model_config.get_vocab_size()
        self._between: dict[str, Tensor] = {}

    def run(self, changed: bool = False) -> Tensor | None:
        """The logits of the first `rows` tokens, [rows, vocabulary]; None where another rank computes them.

        Args:
            changed: take other tokens at the places `_CHANGED`.
        """
        ids = torch.arange(3, 3 + TOKENS)
        if changed:
            ids[list(_CHANGED)] += TOKENS
        ids = (ids % self._vocabulary).to(self._device)
        with torch.inference_mode(), compat.eager_step(self._config, TOKENS), self._attention():
            hidden = self._model(**self._inputs(ids, changed))
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            if not isinstance(hidden, Tensor):  # the next rank of a pipeline goes on
                return None
            logits: Tensor | None = self._model.compute_logits(hidden[: self.rows].clone())
        return logits

    def _inputs(self, ids: Tensor, changed: bool) -> dict[str, Any]:
        positions = torch.arange(TOKENS, device=self._device)
        if self._config.model_config.uses_mrope:
            positions = positions.expand(3, -1).contiguous()
        given: dict[str, Any] = {"input_ids": ids, "positions": positions, "intermediate_tensors": None}
        if not compat.is_first_of_pipeline():
            given["intermediate_tensors"] = self._from_before(changed)
        elif compat.takes_embeddings(self._model):
            given |= {"inputs_embeds": self._model.embed_input_ids(ids), "input_ids": None}
        return given

    def _from_before(self, changed: bool) -> Any:
        """What the rank before would pass on, drawn at random."""
        made = self._model.make_empty_intermediate_tensors(TOKENS, self._config.model_config.dtype, self._device)
        for name, tensor in made.tensors.items():
            if name not in self._between:
                self._between[name] = torch.randn_like(tensor)
            tensor.copy_(self._between[name])
            if changed:
                tensor[list(_CHANGED)] += 1
        return made

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Without a cache attention gives nothing, or what happens to lie in memory: give it its queries instead."""
        layers = compat.attention_layers(self._model)
        for layer in layers:
            layer.forward = _gives_queries(layer.forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


def _gives_queries(forward: Callable[..., Any]) -> Callable[..., Any]:
    def passing(*inputs: Any, **options: Any) -> Any:
        output = forward(*inputs, **options)
        if isinstance(output, Tensor):
            query = inputs[0] if inputs else options.get("query")
            if isinstance(query, Tensor) and query.numel() == output.numel():  # of size 1, as sums of values are small
                output.copy_(nn.functional.normalize(query.float(), dim=-1).reshape(output.shape))
            else:
                output.zero_()
        return output

    return passing


def look(step: DryStep, places: Sequence[Place]) -> SeenLayer:
    """Run two steps and watch the layers."""
    watch = _Watch(places)
    with watch.patched():
        logits = step.run()
        first, watch.calls = watch.calls, {}
        step.run(changed=True)
    found: list[Place] = []
    unserved: list[Unserved] = []
    for place in places:
        calls = first.get(place.name, [])
        answer = _judge(place, calls, watch.calls.get(place.name, []), step.rows)
        if place.name in watch.elsewhere:
            answer = f"{watch.elsewhere[place.name]} reads its weights without asking it"
        if isinstance(answer, str):
            unserved.append(Unserved.of(place, answer))
        else:
            found.append(replace(place, axis=answer))
    return SeenLayer(found, unserved, first, logits)


@dataclass
class _Watch:
    """Records the calls of layers, and what reads their weights outside of such a call."""

    places: Sequence[Place]
    calls: dict[str, list[Call]] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            names = {id(place.module): place.name for place in self.places}
            methods: dict[int, Any] = {}
            for place in self.places:
                if place.kind == NORM:
                    stack.enter_context(_replaced(place.module, "forward", self._norm(place)))
                else:
                    methods[id(place.module.quant_method)] = place.module.quant_method
                if hasattr(place.module, FUSED):
                    stack.enter_context(_replaced(place.module, FUSED, False))
            for method in methods.values():
                stack.enter_context(_replaced(method, "apply", self._method(method.apply, names, MULTIPLY)))
                if hasattr(method, "embedding"):
                    stack.enter_context(_replaced(method, "embedding", self._method(method.embedding, names, LOOK_UP)))
            stack.enter_context(_Readers(self))
            yield

    def _norm(self, place: Place) -> Callable[..., Any]:
        forward = place.module.forward

        def called(*inputs: Any, **options: Any) -> Any:
            with self._call(place.name, NORMALISE, (*inputs, *options.values())):
                return forward(*inputs, **options)

        return called

    def _method(self, function: Callable[..., Any], names: Mapping[int, str], use: str) -> Callable[..., Any]:
        def called(layer: nn.Module, x: Tensor, *more: Any, **options: Any) -> Any:
            name = names.get(id(layer))
            if name is None:
                return function(layer, x, *more, **options)
            with self._call(name, use, (x,)):
                return function(layer, x, *more, **options)

        return called

    @contextlib.contextmanager
    def _call(self, name: str, use: str, inputs: Sequence[Any]) -> Iterator[None]:
        copies = tuple(x.clone() if isinstance(x, Tensor) else None for x in inputs)
        self.calls.setdefault(name, []).append(Call(use, copies))
        self.inside.append(name)
        try:
            yield
        finally:
            self.inside.pop()


class _Readers(TorchDispatchMode):
    """Notes operators that read a layer's weights outside of its calls."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch
        self._owners: dict[int, set[str]] = {}
        for place in watch.places:
            for parameter in place.module.parameters(recurse=False):
                if parameter.numel():
                    self._owners.setdefault(parameter.untyped_storage().data_ptr(), set()).add(place.name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    owners = self._owners.get(tensor.untyped_storage().data_ptr())
                    if owners and not owners.intersection(self._watch.inside):
                        for name in owners:
                            self._watch.elsewhere.setdefault(name, str(func))
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


def _judge(place: Place, first: Sequence[Call], second: Sequence[Call], logits: int) -> int | str:
    """The axis of a layer's tokens, or why it cannot be switched."""
    if not first:
        return "a step of the model does not call it: something else reads its weights, or nothing does"
    if [call.use for call in first] != [call.use for call in second]:
        return "one step calls it in another way than the next"
    axes: set[int] = set()
    for one, other in zip(first, second, strict=True):
        x, y = one.inputs[0], other.inputs[0]
        if x is None or y is None or x.shape != y.shape:
            return "its input is no tensor, or changes its shape from step to step"
        if one.use == NORMALISE:
            axis = _axis(place, x, y)
            if axis is None:
                return f"its input is {_shape(x)}: which token a row belongs to is not known"
            axes.add(axis)
            continue
        rows = x.reshape(1, -1) if one.use == LOOK_UP else x.reshape(-1, x.shape[-1]).T
        other_rows = y.reshape(1, -1) if one.use == LOOK_UP else y.reshape(-1, y.shape[-1]).T
        wanted = logits if place.kind == HEAD or (place.kind == EMBEDDING and one.use == MULTIPLY) else TOKENS
        is_right = rows.shape[1] == wanted and (one.use == LOOK_UP or x.shape[-1] == place.in_features)
        if not is_right or not _is_by_token(rows.T, other_rows.T, wanted, needed=False):
            return f"its input is {_shape(x)} in a step of {wanted} rows: which token a row belongs to is not known"
    if len(axes) > 1:
        return "its tokens lie along another axis in one call than in the next"
    return axes.pop() if axes else 0


def _axis(place: Place, x: Tensor, y: Tensor) -> int | None:
    """The one axis of a norm's input along which its tokens lie."""
    own = tuple(place.module.weight.shape)
    if tuple(x.shape[x.dim() - len(own) :]) != own:
        return None
    found = [
        axis
        for axis in range(x.dim() - len(own))
        if x.shape[axis] == TOKENS and _is_by_token(x.movedim(axis, 0), y.movedim(axis, 0), TOKENS, needed=True)
    ]
    return found[0] if len(found) == 1 else None


def _is_by_token(x: Tensor, y: Tensor, rows: int, *, needed: bool) -> bool:
    """Whether the rows that differ are those of the changed tokens. Later ones may too, where tokens see earlier ones.

    Args:
        needed: some must differ.
    """
    moved = {row for row in range(rows) if not torch.equal(x[row].nan_to_num(), y[row].nan_to_num())}
    changed = {token for token in _CHANGED if token < rows}
    return (not moved and not needed) or (changed <= moved and not any(row < _CHANGED[0] for row in moved))


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"

"""A proof before the first request: layers with deltas compute what they compute with merged weights.

One layer of each class, shape and set of parts gets two experts drawn at random, each changing the weights by about as
much as they are. A few rows of the base and of both experts, in one call, are compared with vLLM's own layer whose
weights are the experts'. Deltas of real experts are hundreds of times smaller, near what 16 bit round away; the
computation is the same, and whether it is right shows only with large ones.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.codec import PackedDelta, pack
from meswitch.errors import MeswitchError
from meswitch.ops.layout import write_by
from meswitch.ops.routing import BASE, MAX_TOKENS, Step
from meswitch.vllm.arena import Arena, Layer
from meswitch.vllm.dry_step import LOOK_UP, TOKENS, Call, DryStep
from meswitch.vllm.places import LINEAR, NORM, Unserved
from meswitch.vllm.support import norm_vector

_OWNERS = (0, BASE, 1, 0, 1, BASE, 1, 0)  # of rows, by slot; as many as some graph has
_MANY = 2 * (MAX_TOKENS + 16)  # rows of a step in which another kernel multiplies
_PATTERN = 64  # rows of a random delta, repeated
_CHECKED = 512  # rows of a matrix that are compared
_SCALE = 0.02  # of a change where a layer's own weights are zeros
_SIZE, _REST = 0.03, 0.1  # how far off the change may be in size, and as a whole, as a share of it
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError, MeswitchError)


def prove_layers(model: nn.Module, arena: Arena, step: Step, calls: Mapping[str, Sequence[Call]]) -> list[Unserved]:
    """Compare one layer of each kind; the slots are empty afterwards.

    Args:
        model: with deltas installed.
        arena: the slots.
        step: whose rows are set here.
        calls: by layer, those of a dry step.

    Returns:
        every layer of the kinds that do not agree.
    """
    verdicts: dict[tuple[Any, ...], str | None] = {}
    found = []
    with torch.inference_mode():
        for layer in arena.layers:
            if not layer.is_switched:
                continue
            place, used = layer.place, calls[layer.place.name]
            kind = _kind(layer, used)
            if kind not in verdicts:
                verdicts[kind] = _try(_Trial(model, arena, step, layer), used)
            if (reason := verdicts[kind]) is not None:
                found.append(Unserved.of(place, reason))
    return found


def _kind(layer: Layer, calls: Sequence[Call]) -> tuple[Any, ...]:
    """What may make a layer compute in another way than the next."""
    place, module = layer.place, layer.place.module
    method = getattr(module, "quant_method", None)
    parts = layer.shape, layer.vectors is None, layer.own is None, layer.extra is None
    flags = [getattr(module, name, None) for name in ("skip_bias_add", "return_bias", "gather_output", "eps")]
    return (
        *(type(module), type(getattr(method, "inner", method)), place.rows, place.in_features, place.axis),
        *(place.bias is None, place.columns is None, place.tied is None, *parts, *flags),
        tuple((call.use, len(call.inputs), call.x.dim()) for call in calls),
    )


def _try(trial: "_Trial", calls: Sequence[Call]) -> str | None:
    try:
        return trial.norm(calls[0]) if trial.layer.place.kind == NORM else trial.matrix(calls)
    except FAULTS as error:
        return f"fails with deltas: {in_short(error)}"
    finally:
        trial.clear()


@dataclass(frozen=True, slots=True)
class _Change:
    """What a random expert changes of a matrix.

    Args:
        rows: [n] int64, those of the layer that are compared.
        weight: [n, in_features] float32, added to these rows.
        bias: [rows of the layer] float32, None without one.
    """

    rows: Tensor
    weight: Tensor
    bias: Tensor | None = None


class _Trial:
    """Two random experts in one layer.

    Args:
        model: with deltas installed.
        arena: the slots.
        step: whose rows are set.
        layer: the one that is tried.
    """

    def __init__(self, model: nn.Module, arena: Arena, step: Step, layer: Layer) -> None:
        self._model, self._arena, self._step, self.layer = model, arena, step, layer
        self._place, self._module = layer.place, layer.place.module
        self._slots = range(min(2, arena.count))
        self._draw = torch.Generator().manual_seed(0)

    def clear(self) -> None:
        """Empty the slots."""
        for slot in self._slots:
            self._arena.put(slot, None)
            if self.layer.extra is not None:
                self.layer.extra[slot].zero_()
        self._own([])

    def norm(self, call: Call) -> str | None:
        """A norm, on the inputs of a dry step."""
        assert self.layer.vectors is not None
        base = norm_vector(self._module)
        changed = [base + 0.5 * self._random(len(base)) for _ in self._slots]
        for slot in self._slots:
            self.layer.vectors[slot].copy_(changed[slot])

        def run(module: Any) -> Any:
            return module(*(x if x is None else x.clone() for x in call.inputs))  # some norms write into them

        def compute(module: Any) -> Tensor:
            output = run(module)
            rows: Tensor = output[0] if isinstance(output, tuple) else output
            return rows.movedim(self._place.axis, 0).flatten(1).float()

        def merged(slot: int) -> Tensor:
            with _with_vector(self._module, changed[slot]):
                return compute(self._module)

        switched = self._model.get_submodule(self._place.name)
        count = call.x.shape[self._place.axis]
        self._own([0] * count)
        if _others(run(switched), run(self._module)):
            return "returns something else than its class does"
        return self._compare(count, lambda: compute(switched), lambda: compute(self._module), merged)

    def matrix(self, calls: Sequence[Call]) -> str | None:
        """A layer that multiplies, that looks rows up, or both."""
        for use in dict.fromkeys(call.use for call in calls):
            x = next(call.x for call in calls if call.use == use)
            reasons = self._look_up(x) if use == LOOK_UP else self._multiply(x)
            if (reason := next(reasons, None)) is not None:
                return reason
        return None

    def _multiply(self, example: Tensor) -> Iterator[str]:
        counts = [len(_OWNERS)]
        if self._place.kind == LINEAR and len(self._step.tokens.token_slots) >= _MANY:
            counts.append(_MANY)
        for count in counts:
            shape = (*example.shape[:-2], count, example.shape[-1])
            yield from self._multiply_rows(self._random(*shape).to(example.device, example.dtype), count)

    def _multiply_rows(self, x: Tensor, count: int) -> Iterator[str]:
        place, module = self._place, self._module
        rows = _some_rows(place.used_rows)
        is_merged = _keeps_its_weight(module, (place.rows, place.in_features))

        def compute() -> Tensor:
            if place.kind == LINEAR and is_merged:
                made = module(x)
            else:  # a head has no forward; of another layer the rank's own share is compared
                made = module.quant_method.apply(module, x, bias=place.bias)
            y, bias = made if isinstance(made, tuple) else (made, None)
            y = (y if bias is None else y + bias).reshape(-1, y.shape[-1])
            shares = [rows + start for start in range(0, y.shape[1], place.rows)]  # of all ranks, if gathered
            return y[:, torch.cat(shares).to(y.device)].float()

        def merged(changes: Sequence[_Change], slot: int) -> Tensor:
            change = changes[slot]
            if is_merged:
                with _with_rows(module, change):
                    return compute()
            # quantised, or packed for a CPU: added to what the base computes
            y = compute() + x.reshape(-1, x.shape[-1]).float() @ change.weight.T
            return y if change.bias is None or not place.biased else y + change.bias[rows]

        with self._bare():
            scale = float(compute().std()) / math.sqrt(place.in_features)
        for changes in self._changes(rows, scale or _SCALE):
            if (reason := self._compare(count, compute, compute, partial(merged, changes))) is not None:
                yield reason

    def _look_up(self, example: Tensor) -> Iterator[str]:
        place, module, extra = self._place, self._module, self.layer.extra
        (source,) = place.sources
        ids = torch.randint(0, source.rows, (example.numel(),), generator=self._draw)
        ids[0], ids[-1] = 0, source.rows - 1
        mine = ids[(ids >= source.first) & (ids < source.last)] - source.first
        rows = mine.unique() if len(mine) else torch.zeros(1, dtype=torch.int64)  # another rank has them all
        ids = ids.view(example.shape).to(example.device)

        def compute() -> Tensor:
            y: Tensor = module(ids)
            return y.reshape(-1, y.shape[-1]).float()

        def merged(changes: Sequence[_Change], slot: int) -> Tensor:
            with _with_rows(module, changes[slot]):
                return compute()

        scale = float(module.weight.detach()[: place.used_rows][:_CHECKED].float().std())
        for changes in self._changes(rows, scale or _SCALE):
            if (reason := self._compare(ids.numel(), compute, compute, partial(merged, changes))) is not None:
                yield reason
        if extra is None:
            return
        beyond = torch.randint(0, extra.shape[1], example.shape, generator=self._draw).to(example.device)
        for slot in self._slots:
            extra[slot].copy_(self._random(*extra.shape[1:]))
            self._own([slot] * beyond.numel())
            if not torch.equal(module(beyond + source.rows).reshape(-1, extra.shape[2]), extra[slot][beyond.view(-1)]):
                yield "gives other rows for an expert's own tokens"

    def _changes(self, rows: Tensor, scale: float) -> Iterator[list[_Change]]:
        """Fill the slots, in each way in which an expert may change this layer."""
        if self.layer.slots is not None or self.layer.vectors is not None:
            yield [self._packed(slot, rows, scale) for slot in self._slots]
        if self.layer.own is not None and self.layer.has_own is not None:
            self.clear()
            yield [self._whole(slot, rows, scale) for slot in self._slots]

    def _packed(self, slot: int, rows: Tensor, scale: float) -> _Change:
        layer, device = self.layer, self._arena.device
        bias = None
        if self._place.bias is not None:
            bias = 0.5 * scale * math.sqrt(self._place.in_features) * self._random(self._place.rows)
            if layer.vectors is not None:
                layer.vectors[slot].copy_(bias)
            bias = bias.to(device)
        if layer.shape is None:
            return _Change(rows.to(device), torch.zeros(len(rows), self._place.in_features, device=device), bias)
        shape = layer.shape
        pattern, salient = min(_PATTERN, shape.rows), min(shape.salient, shape.in_features)
        repeated = torch.arange(shape.rows, device=device) % pattern
        codes = torch.randint(0, 1 << shape.bits, (pattern, shape.in_features), generator=self._draw)
        size = scale / math.sqrt((4**shape.bits - 1) / 3)  # of codes that are all as likely
        scales = size * (0.5 + torch.rand(pattern, shape.groups, generator=self._draw))
        channels = torch.randperm(shape.in_features, generator=self._draw)[:salient].sort().values
        delta = PackedDelta(
            packed=pack(codes, shape.bits).to(device)[repeated],
            scale=scales.bfloat16().to(device)[repeated],
            salient_index=channels.int().to(device),
            salient_weight=(2 * scale * self._random(pattern, salient)).bfloat16().to(device)[repeated],
            bits=shape.bits,
            group_size=shape.group or None,
            in_features=shape.in_features,
        )
        buffer = torch.zeros(shape.nbytes, dtype=torch.uint8)
        write_by(device, delta, buffer, shape)
        at = slot * self._arena.slot_bytes + layer.offset
        self._arena.memory[at : at + shape.nbytes].copy_(buffer)
        self._arena.tables.rows[layer.index, slot] = torch.tensor(shape.table_row(at), device=device)
        rows = rows.to(device)
        some = replace(
            delta, packed=delta.packed[rows], scale=delta.scale[rows], salient_weight=delta.salient_weight[rows]
        )
        return _Change(rows, some.dequantize().float(), bias)

    def _whole(self, slot: int, rows: Tensor, scale: float) -> _Change:
        own, has_own = self.layer.own, self.layer.has_own
        assert own is not None
        assert has_own is not None
        pattern = self._random(min(_PATTERN, own.shape[1]), own.shape[2]) * scale
        own[slot].copy_(pattern.to(own.device)[torch.arange(own.shape[1], device=own.device) % len(pattern)])
        has_own[slot] = True
        rows = rows.to(own.device)
        return _Change(rows, own[slot][rows].float() - self._module.weight.detach()[rows].float())

    def _compare(
        self,
        count: int,
        ours: Callable[[], Tensor],
        base: Callable[[], Tensor],
        merged: Callable[[int], Tensor],
    ) -> str | None:
        """Rows of the base and of the experts in one call, against each alone.

        Args:
            count: rows.
            ours: computes with deltas, [count, width].
            base: the same without.
            merged: the same with an expert's weights, by slot.
        """
        owners = torch.tensor([slot if slot in self._slots else BASE for slot in _OWNERS])
        owners = owners.repeat_interleave(-(-count // len(owners)))[:count]
        self._own(owners.tolist())
        found = ours()
        self._own([])
        with self._bare():
            plain = base()
            wanted = {slot: merged(slot) for slot in self._slots}
        mine = owners == BASE
        if not _is_near(found[mine] - plain[mine], plain[mine]):
            return "changes the base's own rows"
        for slot, rows in wanted.items():
            mine = owners == slot
            if not mine.any():
                continue
            change, right = (found - plain)[mine], (rows - plain)[mine]
            size = float((change * right).sum() / (right * right).sum())
            rest = float((change - right).norm() / right.norm())
            if not (abs(size - 1) < _SIZE and rest < _REST):
                return f"disagrees with merged weights: {size:.2f} of an expert's change, and {rest:.2f} off"
        return None

    @contextlib.contextmanager
    def _bare(self) -> Iterator[None]:
        """vLLM's own layer, without deltas."""
        if self._place.kind == NORM:
            yield
            return
        method = self._module.quant_method
        self._module.quant_method = method.inner
        try:
            yield
        finally:
            self._module.quant_method = method

    def _own(self, owners: Sequence[int]) -> None:
        self._step.tokens.fill(owners)
        self._step.head.fill(owners)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._draw)


def _others(mine: Any, theirs: Any) -> bool:
    """Whether what two norms return beside their rows differs."""
    if isinstance(mine, tuple) != isinstance(theirs, tuple):
        return True
    more = zip(mine[1:], theirs[1:], strict=True) if isinstance(mine, tuple) else ()
    return any((x is None) != (y is None) or (x is not None and not _is_near(x - y, y)) for x, y in more)


def prove_step(dry: DryStep, step: Step, wanted: Tensor | None) -> str | None:
    """A step with rows of several experts that change nothing gives what the base gives.

    Args:
        dry: of the model with deltas installed.
        step: whose rows are set here.
        wanted: the logits before anything was installed, None on a rank that computes none.
    """
    owners = [slot if slot < step.tokens.slots else BASE for slot in _OWNERS[:TOKENS]]
    step.tokens.fill(owners)
    step.head.fill(owners[: dry.rows])
    try:
        found = dry.run()
    except FAULTS as error:
        return f"a step with experts fails: {in_short(error)}"
    finally:
        step.tokens.fill([])
        step.head.fill([])
    if found is None or wanted is None or not wanted.isfinite().all():
        return None
    width = min(found.shape[-1], wanted.shape[-1])  # beyond: tokens that only an expert has
    if not _is_near(found[:, :width].float() - wanted[:, :width].float(), wanted[:, :width].float()):
        return "a step with experts that change nothing does not give what the base gives"
    return None


def in_short(error: Exception) -> str:
    """An error's first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_near(difference: Tensor, whole: Tensor) -> bool:
    return bool(difference.norm() <= _SIZE * whole.norm())


def _some_rows(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, _CHECKED)).round().long().unique()


def _keeps_its_weight(module: Any, shape: tuple[int, int]) -> bool:
    """Whether a layer multiplies with its parameter `weight`, so that changing that changes what it computes."""
    weight = getattr(module, "weight", None)
    packed = getattr(module, "cpu_linear", None) not in (None, nn.functional.linear)
    return not packed and isinstance(weight, Tensor) and weight.shape == shape and weight.dtype.itemsize > 1


@contextlib.contextmanager
def _with_rows(module: Any, change: _Change) -> Iterator[None]:
    """A layer with an expert's weights in some rows."""
    weight = module.weight.detach()
    before = weight[change.rows].clone()
    bias = None if change.bias is None else module.bias.detach()
    kept = None if bias is None else bias.clone()
    weight[change.rows] = (before.float() + change.weight).to(weight.dtype)
    if bias is not None and change.bias is not None:
        bias += change.bias.to(bias.dtype)
    try:
        yield
    finally:
        weight[change.rows] = before
        if bias is not None and kept is not None:
            bias.copy_(kept)


@contextlib.contextmanager
def _with_vector(module: Any, vector: Tensor) -> Iterator[None]:
    """A norm with an expert's weights and biases."""
    kept, at = [], 0
    for leaf in ("weight", "bias"):
        parameter = getattr(module, leaf, None)
        if parameter is not None:
            own = parameter.detach()
            kept.append((own, own.clone()))
            own.copy_(vector[at : at + own.numel()].view(own.shape))
            at += own.numel()
    try:
        yield
    finally:
        for own, before in kept:
            own.copy_(before)

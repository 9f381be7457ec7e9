"""Layers that compute the base for all rows and each expert's part for that expert's rows.

A layer is chosen by what a module computes, never by its name: `SwitchableLinear`, `SwitchableHead`,
`SwitchableEmbedding` and `SwitchableLayerNorm` stand for modules whose `forward` is exactly torch's own,
`SwitchableNorm` for modules that were seen to scale row by row. Every other module is run as it is, once for each
expert, with that expert's parameters in its place (`SwitchableModule`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from meswitch.codec import Delta
from meswitch.engine.context import (
    BASE_SLOT,
    TRITON,
    Owners,
    Rows,
    Switch,
    base_with_deltas,
    product_with_deltas,
)
from meswitch.engine.joined import Joined
from meswitch.engine.parameters import ExpertParameters
from meswitch.engine.tables import Own
from meswitch.errors import MeswitchError
from meswitch.ops import embedding_rows
from meswitch.slots.layout import extra_name


@dataclass(frozen=True, slots=True)
class Seen:
    """How a module was called in a step: where its rows are.

    Args:
        rows: what they are.
        inputs: for each tensor of its arguments the dimension of the rows; None for one that all rows share.
        outputs: for each tensor that it gives the dimension of the rows.
        example: shape and dtype of the first input.
    """

    rows: Rows
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    example: tuple[tuple[int, ...], torch.dtype]

    def rows_before(self, dimensions: int) -> int | None:
        """Where the rows of its one input are, and of its output, if they lie before its last so many dimensions."""
        axis = self.inputs[0]
        if len(self.inputs) != 1 or self.outputs != self.inputs or axis is None:
            return None
        return axis if len(self.example[0]) - axis > dimensions else None


class Switchable(nn.Module):
    """Wraps one module of the base.

    Args:
        base: the module.
        name: its name in the model.
        switch: the running step.
        seen: how it is called.
    """

    base: Any

    def __init__(self, base: nn.Module, name: str, switch: Switch, seen: Seen) -> None:
        super().__init__()
        self.base = base
        self.__dict__["base"] = base  # found there at once; a module's own look-up takes as long as a small product
        self.name = name
        self.switch = switch
        self.seen = seen

    def __getattr__(self, attribute: str) -> Any:
        # models look at `layer.weight.dtype` and the like: answer for the base
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            return getattr(super().__getattr__("base"), attribute)

    @property
    def looked_up(self) -> "list[Own] | None":
        """What it needs tables for, beside packed deltas; None if it cannot be computed from tables."""
        return None

    @property
    def names(self) -> set[str]:
        """Stored names of the tensors that it reads."""
        return set()

    def alone(self, name: str) -> Tensor | None:
        """The merged tensor if one expert owns the whole step: whose the rows are needs no looking then."""
        made = self.switch.alone
        return None if made is None else made.get(name)

    def owners(self, found: int) -> Owners:
        """Who owns the rows. found: how many the module was given.

        Raises:
            MeswitchError: another number than the step has. Nothing is computed then.
        """
        owners = self.switch.step.rows(self.seen.rows)
        if found != len(owners):
            raise MeswitchError(f"{self.name}: {found} rows in a step of {len(owners)}: whose they are is not known")
        return owners


class SwitchableLinear(Switchable):
    """A linear layer: [..., in_features] -> [..., out_features].

    Args:
        weight: stored name of its weight. bias: of its bias.
        transposed: the base's weight is [in_features, out_features].
    """

    def __init__(
        self,
        base: nn.Module,
        name: str,
        switch: Switch,
        seen: Seen,
        *,
        weight: str,
        bias: str | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(base, name, switch, seen)
        self.weight_name, self.bias_name, self.transposed = weight, bias, transposed
        self._plain = bias is None and not transposed
        self.joined: Joined | None = None

    @property
    def names(self) -> set[str]:
        return {self.weight_name} if self.bias_name is None else {self.weight_name, self.bias_name}

    def forward(self, x: Tensor) -> Tensor:
        if (weight := self.alone(self.weight_name)) is not None and self._plain:
            return nn.functional.linear(x, weight, self.base._parameters["bias"])
        owners = self.owners(x.numel() // x.shape[-1])
        if owners.in_tables:
            return self._by_tables(x, owners).view(*x.shape[:-1], -1)
        if self.switch.merged is not None:
            if owners.sole is not None:
                return self._own(owners.sole, x)
            return owners.by_owner(x.reshape(-1, x.shape[-1]), self._own).view(*x.shape[:-1], -1)
        inputs = x.reshape(-1, x.shape[-1])
        layer = None if self.transposed else self.switch.kernel_layer(self.weight_name)
        if layer is not None and owners.any:
            y = product_with_deltas(inputs, self.base, self.base.bias, layer, owners).view(*x.shape[:-1], -1)
        else:
            y = self.base(x)
        outputs = y.view(-1, y.shape[-1])
        for segment in owners.segments:
            added = self._added(inputs, segment.rows, self.switch.tensors(segment.slot))
            if added is not None:
                outputs.index_add_(0, segment.rows, added.to(y.dtype))
        return y

    @property
    def looked_up(self) -> list[Own] | None:
        """As `Switchable.looked_up`."""
        if self.transposed:
            return None
        return [] if self.bias_name is None else [Own(self.bias_name, self.base.bias)]

    @property
    def shared_bias(self) -> Tensor | None:
        """The base's bias, if it is every row's: None where each row's is looked up in a table."""
        has_own = self.switch.tables is not None and self.switch.table(self.bias_name) is not None
        return None if has_own else self.base.bias

    def _by_tables(self, x: Tensor, owners: Owners) -> Tensor:
        """[..., in_features] -> [rows, out_features]."""
        inputs, y = x.reshape(-1, x.shape[-1]), None
        own, low_rank = self.switch.table(self.bias_name), self.switch.low_rank(self.weight_name)
        if self.joined is not None:
            y = self.joined.part(self, x, owners)
        if y is None:
            layer = self.switch.kernel_layer(self.weight_name)
            y = base_with_deltas(inputs, self.base, self.shared_bias, layer, owners)
        if own is not None:
            y = y + own.values[owners.slots]
        return y if low_rank is None else y + low_rank.product(inputs, owners.slots)

    def _own(self, slot: int, rows: Tensor) -> Tensor:
        """An owner's rows by its own weights: [..., in_features] -> [..., out_features]."""
        if slot == BASE_SLOT:
            return self.base(rows)
        base, bias_name = self.base._parameters, self.bias_name
        bias = base["bias"]
        weight = self.switch.own(slot, self.weight_name, base["weight"], transposed=self.transposed)
        if bias_name is not None:
            bias = self.switch.own(slot, bias_name, bias)
        if weight is None or (bias is None and bias_name is not None):
            y = self.base(rows)
            added = self._added(rows.reshape(-1, rows.shape[-1]), None, self.switch.tensors(slot))
            return y if added is None else y + added.view(y.shape).to(y.dtype)
        return nn.functional.linear(rows, weight.T if self.transposed else weight, bias)

    def _added(self, inputs: Tensor, rows: Tensor | None, tensors: Mapping[str, Delta | Tensor]) -> Tensor | None:
        """What an expert adds to the base's output: [n, out_features] float32, None for nothing.

        Args:
            inputs: [rows, in_features]. rows: [n] int64, the expert's; None for all.
        """
        if rows is not None:
            inputs = inputs[rows]
        delta = tensors.get(self.weight_name)
        bias = None if self.bias_name is None else tensors.get(self.bias_name)
        added = None
        if isinstance(delta, Delta):
            added = self.switch.backend.expert_matmul(inputs, delta)
        elif delta is not None:
            change = delta.float() - self.base.weight.float()
            added = inputs.float() @ (change if self.transposed else change.T)
        if isinstance(bias, Tensor):
            shift = bias.float() - self.base.bias.float()
            added = shift.expand(len(inputs), -1) if added is None else added + shift
        return added


class SwitchableHead(Switchable):
    """The head: [..., hidden] -> [..., vocabulary], the largest expert's; tokens that an expert lacks get -inf.

    Args:
        weight: stored name of its weight. bias: of its bias.
        vocabulary: tokens of the largest expert.
    """

    def __init__(
        self, base: nn.Module, name: str, switch: Switch, seen: Seen, *, weight: str, bias: str, vocabulary: int
    ) -> None:
        super().__init__(base, name, switch, seen)
        self.weight_name, self.bias_name, self.vocabulary = weight, bias, vocabulary
        self._plain = base.bias is None

    @property
    def names(self) -> set[str]:
        return {self.weight_name, extra_name(self.weight_name), self.bias_name}

    def forward(self, x: Tensor) -> Tensor:
        weight = self.alone(self.weight_name)
        if weight is not None and self._plain and len(weight) == self.vocabulary:
            return nn.functional.linear(x, weight)
        inputs = x.reshape(-1, x.shape[-1])
        owners = self.owners(len(inputs))
        if owners.in_tables:
            return self._by_tables(inputs, owners).view(*x.shape[:-1], self.vocabulary)
        if self.switch.merged is not None:
            return owners.by_owner(inputs, self._own).view(*x.shape[:-1], self.vocabulary)
        layer = self.switch.kernel_layer(self.weight_name)
        if layer is not None and owners.any:
            base = product_with_deltas(inputs, self.base, self.base.bias, layer, owners)
        else:
            base = self.base(x)
        known = base.shape[-1]
        logits = base.new_full((len(inputs), self.vocabulary), -torch.inf)
        logits[:, :known] = base.view(-1, known)
        for segment in owners.segments:
            tensors = self.switch.tensors(segment.slot)
            if any(name in tensors for name in (self.weight_name, extra_name(self.weight_name), self.bias_name)):
                own = logits[segment.rows]
                self._change(own, inputs[segment.rows], tensors, known)
                logits[segment.rows] = own
        return logits.view(*x.shape[:-1], self.vocabulary)

    @property
    def looked_up(self) -> list[Own] | None:
        """As `Switchable.looked_up`."""
        bias = [] if self.base.bias is None else [Own(self.bias_name, self.base.bias)]
        added = self.vocabulary - len(self.base.weight)
        if bias and added:
            return None
        return [*bias, *([Own(extra_name(self.weight_name), self.base.weight, added)] if added else [])]

    def _by_tables(self, inputs: Tensor, owners: Owners) -> Tensor:
        """[rows, hidden] -> [rows, vocabulary]."""
        layer, own = self.switch.kernel_layer(self.weight_name), self.switch.table(self.bias_name)
        logits = base_with_deltas(inputs, self.base, None, layer, owners)
        if own is not None:
            logits = logits + own.values[owners.slots]
        if (low_rank := self.switch.low_rank(self.weight_name)) is not None:
            logits = logits + low_rank.product(inputs, owners.slots)
        extra = self.switch.table(extra_name(self.weight_name))
        if extra is None:
            return self._filled(logits)
        _, added, width = extra.values.shape
        slots = owners.slots
        of_all = (inputs @ extra.values.view(-1, width).T).view(len(inputs), -1, added)
        of_own = of_all[torch.arange(len(inputs), device=inputs.device), slots]
        beyond = torch.arange(added, device=inputs.device) >= extra.counts[slots][:, None]
        return torch.cat([logits, of_own.masked_fill(beyond, -torch.inf)], 1)

    def _own(self, slot: int, rows: Tensor) -> Tensor:
        """An owner's rows by its own weights: [n, hidden] -> [n, vocabulary]."""
        if slot == BASE_SLOT:
            return self._filled(self.base(rows))
        weight = self.switch.own(slot, self.weight_name, self.base.weight)
        tensors = self.switch.tensors(slot)
        if weight is None:
            base = self.base(rows)
            logits = self._filled(base)
            self._change(logits, rows, tensors, base.shape[-1])
            return logits
        bias = tensors.get(self.bias_name)
        if not isinstance(bias, Tensor):
            bias = self.base.bias
        if bias is not None:
            bias = nn.functional.pad(bias.to(weight.dtype), (0, len(weight) - len(bias)))
        return self._filled(nn.functional.linear(rows, weight, bias))

    def _filled(self, logits: Tensor) -> Tensor:
        """[n, own vocabulary] -> [n, vocabulary]."""
        missing = self.vocabulary - logits.shape[-1]
        return nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def _change(self, own: Tensor, rows: Tensor, tensors: Mapping[str, Delta | Tensor], known: int) -> None:
        """Turn the base's logits into an expert's, in place.

        Args:
            own: [n, vocabulary]. rows: [n, hidden]. known: tokens of the base.
        """
        delta, extra = tensors.get(self.weight_name), tensors.get(extra_name(self.weight_name))
        bias = tensors.get(self.bias_name)
        shift = self._shift(bias, known)
        if isinstance(delta, Tensor):
            whole = rows.float() @ delta.float().T
            if self.base.bias is not None or bias is not None:
                given = bias if isinstance(bias, Tensor) else self.base.bias
                whole = whole + given.float()
            own[:, : len(delta)] = whole.to(own.dtype)
            own[:, len(delta) :] = -torch.inf
            return
        if isinstance(delta, Delta):
            own[:, : delta.rows] += self.switch.backend.expert_matmul(rows, delta).to(own.dtype)
            own[:, delta.rows :] = -torch.inf
            extra = delta.extra
        if shift is not None:
            own[:, : len(shift)] += shift.to(own.dtype)
        if isinstance(extra, Tensor):
            added = rows.float() @ extra.float().T
            if isinstance(bias, Tensor):
                added = added + bias[known:].float()
            own[:, known : known + len(extra)] = added.to(own.dtype)

    def _shift(self, bias: Delta | Tensor | None, known: int) -> Tensor | None:
        """What an expert's bias adds to the base's logits: [tokens that both have] float32."""
        if not isinstance(bias, Tensor):
            return None
        count = min(known, len(bias))
        return bias[:count].float() - (0.0 if self.base.bias is None else self.base.bias[:count].float())


class SwitchableEmbedding(Switchable):
    """A table of rows: [...] int64 -> [..., width]; ids that the base lacks come from the expert's own rows.

    What the module does with its rows beside looking them up (Gemma scales them) is the module's own: it is given the
    rows of a step as its table.

    Args:
        weight: stored name of its weight.
        added: tokens that the largest expert has after the base's.
    """

    def __init__(self, base: nn.Module, name: str, switch: Switch, seen: Seen, *, weight: str, added: int) -> None:
        super().__init__(base, name, switch, seen)
        self.weight_name, self.added = weight, added
        base.padding_idx = None  # type: ignore[assignment]  # of gradients alone; a table of few rows may not have it
        self._looks_up = type(base).forward is nn.Embedding.forward

    @property
    def names(self) -> set[str]:
        return {self.weight_name, extra_name(self.weight_name)}

    def forward(self, ids: Tensor) -> Tensor:
        if self._looks_up and (weight := self.alone(self.weight_name)) is not None:
            return nn.functional.embedding(ids, weight)
        base_rows, flat = self.base.weight.shape[0], ids.reshape(-1)
        owners = self.owners(len(flat))
        if not owners.any:
            return self.base(ids)
        if owners.in_tables:
            out = self._by_tables(flat, owners)
        elif self.switch.merged is not None:
            out = owners.by_owner(flat, self._own)
        else:
            layer = self.switch.kernel_layer(self.weight_name)
            if layer is not None:
                out = embedding_rows(flat, self.base.weight, layer, owners.slots, backend=TRITON)
            else:
                out = nn.functional.embedding(flat.clamp(max=base_rows - 1), self.base.weight)
            for segment in owners.segments:
                changed = self._changed(out, flat, segment.rows, self.switch.tensors(segment.slot))
                if changed is not None:
                    out[segment.rows] = changed
        if self._looks_up:
            return out.view(*ids.shape, -1)
        places = torch.arange(len(out), device=ids.device).view(ids.shape)
        return _with_parameter(self.base, "weight", out, places)

    @property
    def looked_up(self) -> list[Own]:
        """As `Switchable.looked_up`."""
        return [Own(extra_name(self.weight_name), self.base.weight, self.added)] if self.added else []

    def _by_tables(self, ids: Tensor, owners: Owners) -> Tensor:
        """[rows] int64 -> [rows, width]."""
        table, layer = self.base.weight, self.switch.kernel_layer(self.weight_name)
        if layer is not None:
            out = embedding_rows(ids, table, layer, owners.slots, backend=TRITON)
        else:
            out = nn.functional.embedding(ids.clamp(max=len(table) - 1), table)
        if (low_rank := self.switch.low_rank(self.weight_name)) is not None:
            out = out + low_rank.rows(ids, owners.slots)
        extra = self.switch.table(extra_name(self.weight_name))
        if extra is None:
            return out
        own = extra.values[owners.slots, (ids - len(table)).clamp(0, self.added - 1)]
        return torch.where((ids >= len(table))[:, None], own, out)

    def _own(self, slot: int, ids: Tensor) -> Tensor:
        """An owner's rows of its own table: [n] int64 -> [n, width]."""
        table = self.base.weight
        if slot == BASE_SLOT:
            return nn.functional.embedding(ids, table)
        weight = self.switch.own(slot, self.weight_name, table)
        if weight is not None:
            return nn.functional.embedding(ids, weight)
        out = nn.functional.embedding(ids.clamp(max=len(table) - 1), table)
        changed = self._changed(out, ids, slice(None), self.switch.tensors(slot))
        return out if changed is None else changed

    def _changed(
        self, out: Tensor, flat: Tensor, rows: Tensor | slice, tensors: Mapping[str, Delta | Tensor]
    ) -> Tensor | None:
        """An expert's rows of a step: [n, width], None if they are the base's.

        Args:
            out: [rows, width], the base's where it has them. flat: [rows] int64, ids. rows: which are the expert's.
        """
        delta, extra = tensors.get(self.weight_name), tensors.get(extra_name(self.weight_name))
        if delta is None and extra is None:
            return None
        base_rows = self.base.weight.shape[0]
        own = flat[rows]
        if isinstance(delta, Tensor):
            return delta[own].to(out.dtype)
        known = own < base_rows
        values = out[rows].float()
        if isinstance(delta, Delta):
            values[known] += self.switch.backend.expert_rows(own[known], delta)
            extra = delta.extra
        if isinstance(extra, Tensor) and not bool(known.all()):
            values[~known] = extra[own[~known] - base_rows].float()
        return values.to(out.dtype)


class SwitchableNorm(Switchable):
    """A module that scales its input by one parameter, row by row: each expert has its own exact values.

    Args:
        parameter: what it scales by, in the module.
        stored: the parameter's stored name.
    """

    def __init__(self, base: nn.Module, name: str, switch: Switch, seen: Seen, *, parameter: str, stored: str) -> None:
        super().__init__(base, name, switch, seen)
        self.parameter, self.stored = parameter, stored
        self._epsilon = rms_epsilon(base, parameter, seen.example[1])

    @property
    def names(self) -> set[str]:
        return {self.stored}

    @property
    def looked_up(self) -> list[Own]:
        """As `Switchable.looked_up`."""
        return [Own(self.stored, self.base._parameters[self.parameter])]

    def forward(self, x: Tensor) -> Tensor:
        if (weight := self.alone(self.stored)) is not None:
            return _with_parameter(self.base, self.parameter, weight, x)
        axis = self.seen.inputs[0]
        assert axis is not None
        owners = self.owners(x.shape[axis])
        if owners.in_tables:
            table = self.switch.table(self.stored)
            assert table is not None
            rows = by_row(table.values[owners.slots], axis, x.dim())
            if self._epsilon is not None and x.dtype == rows.dtype:
                return rows * nn.functional.rms_norm(x, x.shape[-1:], eps=self._epsilon)
            return _with_parameter(self.base, self.parameter, rows, x)
        if owners.sole == BASE_SLOT:
            return self.base(x)
        weight = self.base._parameters[self.parameter]
        if owners.sole is not None:
            return _with_parameter(self.base, self.parameter, self._own(owners.sole, weight), x)
        own = [self._own(slot, weight) for slot in owners.present]
        rows = torch.stack([weight, *own])[owners.places]
        return _with_parameter(self.base, self.parameter, by_row(rows, axis, x.dim()), x)

    def _own(self, slot: int, weight: Tensor) -> Tensor:
        """An expert's values, in the base's dtype."""
        if self.switch.merged is not None:
            kept = self.switch.own(slot, self.stored, weight)
            if kept is not None:
                return kept
        own = self.switch.tensors(slot).get(self.stored)
        return own.to(weight.dtype) if isinstance(own, Tensor) else weight


def _with_parameter(module: nn.Module, name: str, value: Tensor, x: Tensor) -> Any:
    """Call a module with another tensor in a parameter's place, in a tenth of `torch.func.functional_call`'s time.

    Only the thread that runs the steps calls a wrapped module.
    """
    before = module._parameters[name]
    module._parameters[name] = value  # type: ignore[assignment]
    try:
        return module(x)
    finally:
        module._parameters[name] = before


def by_row(rows: Tensor, axis: int, dimensions: int) -> Tensor:
    """[rows, *shape] -> a tensor that is multiplied with an input whose rows lie at `axis`, `shape` at its end."""
    between = dimensions - axis - rows.dim()
    return rows.view(*[1] * axis, len(rows), *[1] * between, *rows.shape[1:])


@torch.no_grad()
def rms_epsilon(module: nn.Module, parameter: str, dtype: torch.dtype) -> float | None:
    """Epsilon of a norm that is `weight x rms_norm(x)`, which torch computes in one kernel; None if it is another.

    No class says so, so it is tried, in float32 and in the dtype of a step, where a weight that is multiplied before
    the result is rounded gives other numbers.
    """
    weight = dict(module.named_parameters())[parameter]
    if weight.dim() != 1:
        return None
    for epsilon in {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1}:
        tried = functools.partial(_is_rms_norm, module, parameter, weight, epsilon)
        if tried(torch.float32, 0.0) and (dtype == torch.float32 or tried(dtype, _ROUNDED_OTHERWISE)):
            return epsilon
    return None


_ROUNDED_OTHERWISE = 0.02  # of the numbers of two ways to sum the same squares


def _is_rms_norm(
    module: nn.Module, parameter: str, weight: Tensor, epsilon: float, dtype: torch.dtype, differing: float
) -> bool:
    width = len(weight)
    own = torch.linspace(-1, 2, width, device=weight.device, dtype=dtype)
    # the smallest are about the root of epsilon, so that it counts
    sizes = torch.tensor([[epsilon**0.5], [0.1], [1], [30]], device=weight.device)
    x = (torch.linspace(1, 97, width, device=weight.device).cos() * sizes)[None].to(dtype)
    found = _tried(module, parameter, own, x)
    ours = own * nn.functional.rms_norm(x, x.shape[-1:], eps=epsilon)
    if found is None or found.dtype != ours.dtype:
        return False
    if dtype == torch.float32:
        return torch.allclose(found, ours, rtol=1e-5, atol=1e-7)
    return torch.allclose(found, ours, rtol=0.01) and float((found != ours).float().mean()) <= differing


@torch.no_grad()
def scales_row_by_row(module: nn.Module, parameter: str, seen: Seen) -> bool:
    """Whether a module takes a value of its parameter for each row, so that one call serves all experts: most norms do.

    No class says so, so it is tried with two rows at the place where the module was seen to have its rows.
    """
    weight = dict(module.named_parameters())[parameter]
    shape, dtype = seen.example
    axis = seen.rows_before(weight.dim())
    if axis is None:
        return False
    two = [2 if place == axis else size for place, size in enumerate(shape)]
    both = torch.stack([weight, weight + 1])
    x = torch.linspace(-1, 2, torch.Size(two).numel(), device=weight.device, dtype=dtype).view(two)
    found = _tried(module, parameter, by_row(both, axis, len(shape)), x)
    if found is None:
        return False
    pairs = zip(both, x.split(1, axis), strict=True)
    wanted = [torch.func.functional_call(module, {parameter: w}, (row,)) for w, row in pairs]
    # close, not equal: a GPU may sum fewer rows in another order
    return torch.allclose(found, torch.cat(wanted, axis), rtol=0.02, atol=0.02)


def _tried(module: nn.Module, parameter: str, value: Tensor, x: Tensor) -> Tensor | None:
    """What a module gives with another tensor in a parameter's place; None if it does not take that, or give one of x's
    shape.
    """
    try:
        found = torch.func.functional_call(module, {parameter: value}, (x,))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    return found if isinstance(found, Tensor) and found.shape == x.shape else None


class SwitchableModule(Switchable):
    """Any module that treats its rows one by one: run for the base, and again for each expert's rows.

    Args:
        parameters: what an expert's tensors make of the module's parameters.
    """

    def __init__(self, base: nn.Module, name: str, switch: Switch, seen: Seen, *, parameters: ExpertParameters) -> None:
        super().__init__(base, name, switch, seen)
        self.parameters_of = parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if len(tensors) != len(self.seen.inputs):
            raise MeswitchError(f"{self.name}: is called with {len(tensors)} tensors, before with another number")
        places = dict(zip(tensors, self.seen.inputs, strict=True))
        owners: Owners | None = None
        for place, axis in places.items():
            if axis is not None:
                owners = self.owners(leaves[place].shape[axis])
        if owners is not None and owners.sole is not None and owners.any:
            return torch.func.functional_call(self.base, self._own(owners.sole), args, kwargs)
        given = self.base(*args, **kwargs)
        if owners is None or not owners.any:
            return given
        outputs, shape = pytree.tree_flatten(given)
        outputs = [output.clone() if isinstance(output, Tensor) else output for output in outputs]
        for segment in owners.segments:
            own = self._own(segment.slot)
            if not own:
                continue
            part = [
                leaf if places.get(place) is None else leaf.index_select(places[place], segment.rows)
                for place, leaf in enumerate(leaves)
            ]
            some, more = pytree.tree_unflatten(part, spec)
            made = pytree.tree_leaves(torch.func.functional_call(self.base, own, some, more))
            for output, value, axis in _tensors(outputs, made, self.seen.outputs):
                output.index_copy_(axis, segment.rows, value.to(output.dtype))
        return pytree.tree_unflatten(outputs, shape)

    def _own(self, slot: int) -> dict[str, Tensor]:
        """What an expert has in place of the module's parameters."""
        tensors, kept = self.switch.tensors(slot), None
        if self.switch.merged is not None:
            kept = self.switch.merged.parameters(slot, self.name, self.base, self.parameters_of)
        return self.parameters_of.own(self.base, tensors) if kept is None else kept


class SwitchableLayerNorm(SwitchableModule):
    """A LayerNorm: each expert has its own exact values of weight and bias.

    Args:
        stored: parameter -> its stored name, of those that some expert changes.
    """

    base: nn.LayerNorm

    def __init__(
        self,
        base: nn.LayerNorm,
        name: str,
        switch: Switch,
        seen: Seen,
        *,
        parameters: ExpertParameters,
        stored: Mapping[str, str],
    ) -> None:
        super().__init__(base, name, switch, seen, parameters=parameters)
        self.stored = dict(stored)

    @property
    def names(self) -> set[str]:
        return set(self.stored.values())

    @property
    def looked_up(self) -> list[Own]:
        """As `Switchable.looked_up`."""
        return [Own(stored, self._value(parameter)) for parameter, stored in self.stored.items()]

    def forward(self, x: Tensor) -> Tensor:
        axis = self.seen.inputs[0]
        assert axis is not None
        owners = self.owners(x.shape[axis])
        if not owners.in_tables:
            found: Tensor = super().forward(x)
            return found
        # in float32, as torch's kernel computes with parameters of 16 bits: the result is rounded once
        y = nn.functional.layer_norm(x.float(), self.base.normalized_shape, eps=self.base.eps)
        y = y * self._rows("weight", owners, axis, x.dim())
        if self.base.bias is not None:
            y = y + self._rows("bias", owners, axis, x.dim())
        return y.to(x.dtype)

    def _rows(self, parameter: str, owners: Owners, axis: int, dimensions: int) -> Tensor:
        """A parameter of each row's owner, as it is multiplied with the input."""
        table = self.switch.table(self.stored.get(parameter))
        if table is None:
            return self._value(parameter)
        return by_row(table.values[owners.slots], axis, dimensions)

    def _value(self, parameter: str) -> Tensor:
        value = self.base._parameters[parameter]
        assert value is not None
        return value


def _tensors(outputs: Sequence[Any], made: Sequence[Any], axes: Sequence[int]) -> Sequence[tuple[Tensor, Tensor, int]]:
    pairs = [(o, m) for o, m in zip(outputs, made, strict=True) if isinstance(o, Tensor)]
    return [(o, m, axis) for (o, m), axis in zip(pairs, axes, strict=True)]


# A wrapper is made of a module, its name, the running step and how it was seen.
Wrap = Callable[[nn.Module, str, Switch, Seen], Switchable]

"""Layers that compute the base for all tokens and add each expert's delta to that expert's tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from meswitch.codec import PackedDelta
from meswitch.engine.context import Switch
from meswitch.engine.kernel import TRITON, product
from meswitch.experts.layout import extra_name
from meswitch.ops import embedding_rows


class Switchable(nn.Module):
    """Wraps one layer of the base; `name` is the layer's name in the checkpoint."""

    base: Any

    def __init__(self, base: nn.Module, name: str, switch: Switch) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.switch = switch

    def __getattr__(self, attribute: str) -> Any:
        # models look at `layer.weight.dtype` and the like: answer for the base
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            return getattr(super().__getattr__("base"), attribute)


class SwitchableLinear(Switchable):
    """A linear layer: [..., in_features] -> [..., out_features]."""

    def forward(self, x: Tensor) -> Tensor:
        inputs, owners = x.reshape(-1, x.shape[-1]), self.switch.step.owners
        layer = self.switch.kernel_layer(f"{self.name}.weight")
        if layer is not None and owners.any:
            y = product(inputs, self.base.weight, self.base.bias, layer, owners).view(*x.shape[:-1], -1)
        else:
            y = self.base(x)
        outputs = y.view(-1, y.shape[-1])
        for segment in self.switch.step.segments:
            tensors = self.switch.tensors(segment.slot)
            delta, bias = tensors.get(f"{self.name}.weight"), tensors.get(f"{self.name}.bias")
            if isinstance(delta, PackedDelta):
                added = self.switch.backend.expert_matmul(inputs[segment.tokens], delta)
            elif delta is not None:
                added = inputs[segment.tokens].float() @ (delta.float() - self.base.weight.float()).T
            else:
                added = None
            if isinstance(bias, Tensor):
                shift = bias.float() - self.base.bias.float()
                added = shift.expand(len(segment.tokens), -1) if added is None else added + shift
            if added is not None:
                outputs.index_add_(0, segment.tokens, added.to(y.dtype))
        return y


class SwitchableHead(Switchable):
    """The head: [..., hidden] -> [..., vocabulary], the largest expert's; tokens that an expert lacks get -inf."""

    def __init__(self, base: nn.Module, name: str, switch: Switch, vocabulary: int) -> None:
        super().__init__(base, name, switch)
        self.vocabulary = vocabulary

    def forward(self, x: Tensor) -> Tensor:
        inputs, owners = x.reshape(-1, x.shape[-1]), self.switch.step.head_owners
        layer = self.switch.kernel_layer(f"{self.name}.weight")
        if layer is not None and owners.any:
            base = product(inputs, self.base.weight, self.base.bias, layer, owners)
        else:
            base = self.base(x)
        logits = base.new_full((len(inputs), self.vocabulary), -torch.inf)
        logits[:, : base.shape[-1]] = base.view(-1, base.shape[-1])
        for segment in self.switch.step.head_segments:
            tensors = self.switch.tensors(segment.slot)
            delta, extra = tensors.get(f"{self.name}.weight"), tensors.get(extra_name(f"{self.name}.weight"))
            if delta is None and extra is None:
                continue
            rows = inputs[segment.tokens]
            own = logits[segment.tokens]
            if isinstance(delta, PackedDelta):
                own[:, : delta.rows] += self.switch.backend.expert_matmul(rows, delta).to(own.dtype)
                own[:, delta.rows :] = -torch.inf
                extra = delta.extra
            if isinstance(extra, Tensor):
                added = rows.float() @ extra.float().T
                own[:, base.shape[-1] : base.shape[-1] + len(extra)] = added.to(own.dtype)
            if isinstance(delta, Tensor):
                own[:, : len(delta)] = (rows.float() @ delta.float().T).to(own.dtype)
                own[:, len(delta) :] = -torch.inf
            logits[segment.tokens] = own
        return logits.view(*x.shape[:-1], self.vocabulary)


class SwitchableEmbedding(Switchable):
    """The embedding: [...] int64 -> [..., hidden]; ids that the base does not have come from the expert's own rows."""

    def forward(self, ids: Tensor) -> Tensor:
        base_rows, owners = self.base.weight.shape[0], self.switch.step.owners
        flat = ids.reshape(-1)
        layer = self.switch.kernel_layer(f"{self.name}.weight")
        if layer is not None and owners.any:
            out = embedding_rows(flat, self.base.weight, layer, owners.slots, backend=TRITON)
            hidden = out.view(*ids.shape, -1)
        else:
            hidden = self.base(ids.clamp(max=base_rows - 1))
            out = hidden.view(-1, hidden.shape[-1])
        for segment in self.switch.step.segments:
            tensors = self.switch.tensors(segment.slot)
            delta, extra = tensors.get(f"{self.name}.weight"), tensors.get(extra_name(f"{self.name}.weight"))
            if delta is None and extra is None:
                continue
            own = flat[segment.tokens]
            known = own < base_rows
            values = out[segment.tokens].float()
            if isinstance(delta, PackedDelta):
                values[known] += self.switch.backend.expert_rows(own[known], delta)
                extra = delta.extra
            if isinstance(extra, Tensor) and not bool(known.all()):
                values[~known] = extra[own[~known] - base_rows].float()
            if isinstance(delta, Tensor):
                values = delta[own]
            out[segment.tokens] = values.to(out.dtype)
        return hidden


class SwitchableNorm(Switchable):
    """A normalisation over the last dimension: [1, tokens, ..., features]; each expert has its own exact weights."""

    def __init__(self, base: nn.Module, name: str, switch: Switch) -> None:
        super().__init__(base, name, switch)
        self._row_by_row = _scales_row_by_row(base)

    def forward(self, x: Tensor) -> Tensor:
        owners = self.switch.step.owners
        if not owners.any:
            return self.base(x)
        if self._row_by_row:
            weight = self.base.weight
            weights = [weight, *(self._own(slot).get("weight", weight) for slot in owners.present)]
            rows = torch.stack(weights)[owners.places]
            shaped = rows.view(len(rows), *[1] * (x.dim() - 3), -1)
            return torch.func.functional_call(self.base, {"weight": shaped}, (x,))
        y = self.base(x)
        for segment in self.switch.step.segments:
            if own := self._own(segment.slot):
                y[:, segment.tokens] = torch.func.functional_call(self.base, own, (x[:, segment.tokens],))
        return y

    def _own(self, slot: int) -> dict[str, Tensor]:
        tensors = self.switch.tensors(slot)
        return {
            key: value.to(parameter.dtype)
            for key, parameter in self.base.named_parameters()
            if isinstance(value := tensors.get(f"{self.name}.{key}"), Tensor)
        }


@torch.no_grad()
def _scales_row_by_row(norm: nn.Module) -> bool:
    """Whether a norm takes a weight for each row, so that one call serves all experts: most do, no class says so."""
    parameters = dict(norm.named_parameters())
    if list(parameters) != ["weight"]:
        return False
    weight = parameters["weight"]
    both = torch.stack([weight, weight + 1])
    x = torch.linspace(-1, 2, both.numel(), device=weight.device, dtype=weight.dtype).view(1, *both.shape)
    try:
        found = torch.func.functional_call(norm, {"weight": both}, (x,))
    except (RuntimeError, ValueError, TypeError):
        return False
    wanted = [torch.func.functional_call(norm, {"weight": w}, (x[:, i : i + 1],)) for i, w in enumerate(both)]
    # close, not equal: a GPU may sum fewer rows in another order
    return found.shape == x.shape and torch.allclose(found, torch.cat(wanted, 1), rtol=0.02, atol=0.02)

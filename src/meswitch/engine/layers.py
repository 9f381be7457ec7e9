"""Layers that compute the base for all tokens and add each expert's delta to that expert's tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from meswitch.codec import PackedDelta
from meswitch.engine.context import Switch


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
        y = self.base(x)
        inputs, outputs = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
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
        base = self.base(x)
        inputs = x.reshape(-1, x.shape[-1])
        logits = base.new_full((len(inputs), self.vocabulary), -torch.inf)
        logits[:, : base.shape[-1]] = base.view(-1, base.shape[-1])
        for segment in self.switch.step.head_segments:
            delta = self.switch.tensors(segment.slot).get(f"{self.name}.weight")
            if delta is None:
                continue
            rows = inputs[segment.tokens]
            own = logits[segment.tokens]
            if isinstance(delta, PackedDelta):
                own[:, : delta.rows] += self.switch.backend.expert_matmul(rows, delta).to(own.dtype)
                own[:, delta.rows :] = -torch.inf
                if delta.extra is not None:
                    added = rows.float() @ delta.extra.float().T
                    own[:, delta.rows : delta.rows + added.shape[1]] = added.to(own.dtype)
            else:
                own[:, : len(delta)] = (rows.float() @ delta.float().T).to(own.dtype)
                own[:, len(delta) :] = -torch.inf
            logits[segment.tokens] = own
        return logits.view(*x.shape[:-1], self.vocabulary)


class SwitchableEmbedding(Switchable):
    """The embedding: [...] int64 -> [..., hidden]; ids that the base does not have come from the expert's own rows."""

    def forward(self, ids: Tensor) -> Tensor:
        base_rows = self.base.weight.shape[0]
        hidden = self.base(ids.clamp(max=base_rows - 1))
        flat, out = ids.reshape(-1), hidden.view(-1, hidden.shape[-1])
        for segment in self.switch.step.segments:
            delta = self.switch.tensors(segment.slot).get(f"{self.name}.weight")
            if delta is None:
                continue
            own = flat[segment.tokens]
            if isinstance(delta, PackedDelta):
                values = out[segment.tokens].float()
                known = own < delta.rows
                values[known] += self.switch.backend.expert_rows(own[known], delta)
                if delta.extra is not None and not bool(known.all()):
                    values[~known] = delta.extra[own[~known] - delta.rows].float()
            else:
                values = delta[own]
            out[segment.tokens] = values.to(out.dtype)
        return hidden


class SwitchableNorm(Switchable):
    """A normalisation over the last dimension: [1, tokens, ..., features]; each expert has its own exact weights."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for segment in self.switch.step.segments:
            tensors = self.switch.tensors(segment.slot)
            own = {
                key: value.to(parameter.dtype)
                for key, parameter in self.base.named_parameters()
                if isinstance(value := tensors.get(f"{self.name}.{key}"), Tensor)
            }
            if own:
                y[:, segment.tokens] = torch.func.functional_call(self.base, own, (x[:, segment.tokens],))
        return y

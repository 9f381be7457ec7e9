"""Norms with each token's own weights.

Linear layers have a method that can be wrapped, whatever their class; norms are computed here anew. So each class that
is served has its formula, and the proof at start compares it with the class's own forward.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.ops.step import Step, is_idle


@dataclass(frozen=True, slots=True)
class Formula:
    """How a class of norms computes.

    Args:
        centred: subtracts the mean first.
        offset: what is added to its weight.
        wide: multiplies in float32 and rounds once; else in the weight's dtype.
        adds: a residual is added to the input first, and returned.
        pair: a residual is always returned, as it came unless `adds`.
    """

    centred: bool = False
    offset: float = 0.0
    wide: bool = True
    adds: bool = False
    pair: bool = False


_LAYERS, _MODELS = "vllm.model_executor.layers.layernorm", "vllm.model_executor.models"
_FUSED = f"{_MODELS}.transformers.fusers.rms_norm"
# By exact class. A class that a version of vLLM lacks, or that moved, is one that is not served.
FORMULAS = {
    f"{_LAYERS}.RMSNorm": Formula(wide=False, adds=True),
    f"{_FUSED}.TPAwareRMSNorm": Formula(wide=False, adds=True),
    f"{_LAYERS}.GemmaRMSNorm": Formula(offset=1.0, adds=True),
    f"{_FUSED}.TPAwareGemmaRMSNorm": Formula(offset=1.0, adds=True),
    f"{_LAYERS}.LayerNorm": Formula(centred=True),
    "torch.nn.modules.normalization.LayerNorm": Formula(centred=True),
    f"{_MODELS}.commandr.LayerNorm": Formula(centred=True, pair=True),
    f"{_MODELS}.commandr.RMSNorm": Formula(pair=True),
    f"{_MODELS}.nemotron.NemotronLayerNorm1P": Formula(centred=True, offset=1.0, adds=True),
}


def formula_of(module: nn.Module) -> Formula | None:
    """A norm's formula; None where its class is not known exactly, or it has no weights."""
    kind = type(module)
    known = FORMULAS.get(f"{kind.__module__}.{kind.__qualname__}")
    has_weight = isinstance(getattr(module, "weight", None), nn.Parameter) and getattr(module, "has_weight", True)
    return known if has_weight else None


def norm_vector(module: Any) -> Tensor:
    """[width] float32 on the host: a norm's weight, then its bias if it has one."""
    parts = [module.weight] if getattr(module, "bias", None) is None else [module.weight, module.bias]
    return torch.cat([part.detach().float().cpu().reshape(-1) for part in parts])


class DeltaNorm(nn.Module):
    """A norm that gives each token its own expert's weights.

    Args:
        base: vLLM's norm.
        vectors: [slots + 1, width] float32, as `norm_vector` lays them out; the last is the base's.
        step: the step that runs.
        axis: of the input, along which tokens lie.
    """

    def __init__(self, base: Any, vectors: Tensor, step: Step, axis: int = 0) -> None:
        super().__init__()
        formula = formula_of(base)
        assert formula is not None
        self.base_layer, self.vectors, self.step, self.axis = base, vectors, step, axis
        self.formula = formula
        self.shape = tuple(base.weight.shape)
        self.eps = base.variance_epsilon if hasattr(base, "variance_epsilon") else base.eps
        self.variance_size = getattr(base, "variance_size_override", None)
        self.is_biased = getattr(base, "bias", None) is not None

    def __getattr__(self, name: str) -> Any:  # some models look at a norm's weight or size
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """The same shape as `x`; and the residual, where the base's norm returns it."""
        formula, dtype = self.formula, x.dtype
        if is_idle(self.step, x):
            return self.base_layer(x) if residual is None and not formula.pair else self.base_layer(x, residual)
        wide = x.float()
        if residual is not None and formula.adds:
            wide = wide + residual.float()
            residual = wide.to(dtype)
        if formula.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        measured = wide if self.variance_size is None else wide[..., : self.variance_size]
        normal = wide * torch.rsqrt(measured.pow(2).mean(-1, keepdim=True) + self.eps)
        weight, bias = self._own(x)
        if formula.wide:
            y = normal * (weight + formula.offset)
        else:
            weight = weight.to(self.base_layer.weight.dtype)
            y = normal.to(weight.dtype) * weight
        y = (y if bias is None else y + bias).to(dtype)
        return (y, residual) if formula.pair or residual is not None else y

    def _own(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each token's weight and bias, to be multiplied with `x`."""
        tokens = x.shape[self.axis]
        own = self.vectors[self.step.tokens.token_slots[:tokens]]
        between = x.dim() - self.axis - 1 - len(self.shape)
        shape = (*[1] * self.axis, tokens, *[1] * between, *self.shape)
        if not self.is_biased:
            return own.view(shape), None
        weight, bias = own.chunk(2, dim=1)
        return weight.reshape(shape), bias.reshape(shape)

"""Which architectures are served in vLLM, as far as facts say before it starts, and which norms. Needs no vLLM.

vLLM's engine has the last word: when it opens it looks at every layer and proves each kind, see `proof`. Linear layers
have a method that can be wrapped, whatever their class; norms are computed anew. So each class of norms that is served
has its formula here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.architecture import (
    BIAS,
    CONVOLUTION,
    EMBEDDING,
    EXPERTS,
    HEAD,
    LINEAR,
    NORM,
    OTHER,
    ROUTER,
    TRANSPOSED,
    Architecture,
    Part,
)

# Why a layer is not served. The engine says the same where it refuses one.
MIXTURE = "a mixture's experts: one kernel computes all of them, and takes one set of matrices"
ROUTES = "decides which experts of a mixture see a token, in a kernel of its own"
STATE_SPACE = "a state-space layer"
CONVOLVES = "a convolution"
TABLE = "a table of something else than tokens, such as positions"
TURNED = "the checkpoint stores its matrix turned, [in, out]"
ORDERED = "vLLM puts its rows in another order as it loads them"
UNKNOWN = "a layer that is not known here"
# Classes of transformers whose models were compared with merged ones in vLLM, token by token.
TRIED = frozenset(
    {
        "Cohere2ForCausalLM",
        "CohereForCausalLM",
        "Ernie4_5ForCausalLM",
        "Exaone4ForCausalLM",
        "FalconForCausalLM",
        "GPTJForCausalLM",
        "GPTNeoXForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GemmaForCausalLM",
        "Glm4ForCausalLM",
        "GlmForCausalLM",
        "GraniteForCausalLM",
        "HunYuanDenseV1ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "NemotronForCausalLM",
        "Olmo2ForCausalLM",
        "OlmoForCausalLM",
        "Phi3ForCausalLM",
        "PhiForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "SeedOssForCausalLM",
        "SmolLM3ForCausalLM",
        "StableLmForCausalLM",
        "Starcoder2ForCausalLM",
    }
)
_BY_ROLE = {
    TRANSPOSED: TURNED,
    EXPERTS: MIXTURE,
    ROUTER: ROUTES,
    CONVOLUTION: CONVOLVES,
    OTHER: UNKNOWN,
}
STATE_SPACES = ("Mamba", "ShortConv", "DeltaNet", "LinearAttention", "GDN")  # parts of the names of such classes


def vllm_support(architecture: Architecture) -> list[str]:
    """Why an expert whose every tensor changed is not served in vLLM; empty if it is.

    Returns:
        a line for each kind of layer, all at once: the first module, how many more, its class and the reason.
    """
    by_reason: dict[tuple[str, str], list[str]] = {}
    for part in architecture.parts.values():
        reason = _reason(architecture, part)
        if reason is not None:
            modules = by_reason.setdefault((part.kind, reason), [])
            if part.module not in modules:
                modules.append(part.module)
    lines = []
    for (kind, reason), modules in by_reason.items():
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        lines.append(f"{modules[0]}{more}: {kind}: {reason}")
    name = type(architecture.model).__name__
    if not lines and name not in TRIED:
        lines.append(f"{name}: not tried in vLLM; its engine proves every layer when it opens, and refuses by name")
    return lines


def _reason(architecture: Architecture, part: Part) -> str | None:
    if part.role == OTHER and any(word in part.kind for word in STATE_SPACES):
        return STATE_SPACE
    if part.role in _BY_ROLE:
        return _BY_ROLE[part.role]
    if part.role == EMBEDDING and not part.is_vocabulary:
        return TABLE
    if part.role == LINEAR and _is_ordered(architecture, part):
        return ORDERED
    assert part.role in (BIAS, EMBEDDING, HEAD, LINEAR, NORM)
    return None


def _is_ordered(architecture: Architecture, part: Part) -> bool:
    """Whether queries, keys and values of a head lie together in the checkpoint, and vLLM sorts them."""
    if not part.module.endswith("query_key_value"):
        return False
    config = architecture.text_config
    if config.model_type == "falcon":
        return bool(config.new_decoder_architecture) or not config.multi_query
    return config.model_type == "bloom"


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

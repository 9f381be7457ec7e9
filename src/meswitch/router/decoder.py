"""The first layers of a Llama or Mistral in float32, computed without their modules, on the same weights.

Of a small base more than half of a query's time is the dispatch of transformers' modules. The states are the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

_TYPES = ("llama", "mistral")
_ROPES = ("default", "linear", "llama3")  # whose angles depend on the position alone


def is_plain(model: Any) -> bool:
    """Whether `DecoderLayers` computes what this model does; elsewhere than in float32 on the CPU it need not."""
    config = model.config
    rope = getattr(getattr(model, "rotary_emb", None), "rope_type", None)
    weight = model.get_input_embeddings().weight
    return (
        config.model_type in _TYPES
        and config.hidden_act == "silu"
        and rope in _ROPES
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
    )


class DecoderLayers:
    """Token ids -> hidden states.

    Args:
        model: the decoder without its head; `is_plain` holds. count: how many of its layers are wanted.
    """

    def __init__(self, model: Any, count: int) -> None:
        config = model.config
        self.window: int | None = getattr(config, "sliding_window", None)
        self._depth: int = config.num_hidden_layers
        self._words = model.embed_tokens.weight.detach()
        self._norm = _norm(model.norm)
        self._rotary = model.rotary_emb
        self._angles = torch.zeros(2, 0, 0)
        self._width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._layers = [_parts(layer) for layer in model.layers[:count]]

    def __call__(self, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The states [batch, tokens, hidden] after each of `layers`; 0: before the first, depth: the model's output.

        ids: [batch, tokens] int64, padded on the right: what comes later is never looked at.
        """
        x = embedding(ids, self._words)
        cos, sin = self._cos_sin(x)
        states = [x]
        for layer in self._layers[: max(layers)]:
            x = self._step(x, cos, sin, layer)
            states.append(x)
        return [rms_norm(x, *self._norm) if layer == self._depth else states[layer] for layer in layers]

    def _cos_sin(self, x: Tensor) -> Tensor:
        """[2, tokens, head width]; the sine with the sign that turns half a head against the other."""
        tokens = x.shape[1]
        if self._angles.shape[1] < tokens:
            cos, sin = self._rotary(x, torch.arange(tokens)[None])
            half = sin.shape[-1] // 2
            self._angles = torch.stack([cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], 1)])
        return self._angles[:, :tokens]

    def _step(self, x: Tensor, cos: Tensor, sin: Tensor, layer: Any) -> Tensor:
        first, query, key, value, out, second, gate, up, down = layer
        batch, tokens, _ = x.shape
        h = rms_norm(x, *first)
        q, k, v = (
            linear(h, *part).view(batch, tokens, -1, self._width).transpose(1, 2) for part in (query, key, value)
        )
        half = self._width // 2
        q, k = (part * cos + part.roll(half, -1) * sin for part in (q, k))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + linear(mixed.transpose(1, 2).reshape(batch, tokens, -1), *out)
        h = rms_norm(x, *second)
        return x + linear(silu(linear(h, *gate)) * linear(h, *up), *down)


def _parts(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return (
        _norm(layer.input_layernorm),
        *map(_linear, projections),
        _norm(layer.post_attention_layernorm),
        *map(_linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
    )


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def _norm(module: Any) -> tuple[tuple[int, ...], Tensor, float]:
    return tuple(module.weight.shape), module.weight.detach(), module.variance_epsilon

"""Hidden states of the first layers of a model, without computing the rest.

Models of the BERT family, and of the Llama and Mistral families on the CPU, are computed without transformers'
modules: their dispatch takes up to half of the time of a short query, too much where a router has 3 ms. The states
are the same ones.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, linear, rms_norm, scaled_dot_product_attention, silu

# Hidden states of the first layers of a transformers model, without computing the rest.


def stack_of(model: Any) -> nn.ModuleList | None:
    """The layers, where most decoders (`layers`) and most encoders (`encoder.layer`) keep them; None elsewhere."""
    for stack in (getattr(model, "layers", None), getattr(getattr(model, "encoder", None), "layer", None)):
        if isinstance(stack, nn.ModuleList):
            return stack
    return None


def hidden_states(model: Any, layers: Sequence[int], depth: int, inputs: dict[str, Any]) -> list[Tensor]:
    """The states [batch, tokens, hidden] after each of `layers`; 0: before the first, depth: the model's output.

    Hooks for this one pass rather than `output_hidden_states`, whose own hooks stay on the layers and count double
    where a shortened model shares them with a whole one.
    """
    stack = stack_of(model)
    if stack is None:
        states = model(**inputs, output_hidden_states=True).hidden_states
        return [states[layer] for layer in layers]
    found: dict[int, Tensor] = {}

    def keep(layer: int, value: Any) -> None:
        found[layer] = value[0] if isinstance(value, tuple) else value

    handles = []
    for layer in {*layers} - {depth}:
        if layer == 0:
            handles.append(stack[0].register_forward_pre_hook(lambda _, args: keep(0, args[0])))
        else:
            handles.append(stack[layer - 1].register_forward_hook(lambda _, __, out, layer=layer: keep(layer, out)))
    try:
        found[depth] = model(**inputs).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in layers]


def first_layers(model: Any, count: int, depth: int) -> Any:
    """The model up to its layer `count`, on the same weights; the whole one where that is not known to be possible."""
    stack = stack_of(model)
    if count >= depth or stack is None:
        return model
    kept = stack[: max(1, count)]
    short = copy.copy(model)
    short.config = copy.copy(model.config)
    short.config.num_hidden_layers = len(kept)
    if stack is getattr(model, "layers", None):
        short._modules = {**model._modules, "layers": kept}
    else:
        short._modules = {**model._modules, "encoder": copy.copy(model.encoder)}
        short.encoder._modules = {**model.encoder._modules, "layer": kept}
        short.encoder.config = short.config
        if "pooler" in short._modules:
            short._modules["pooler"] = None
    return short


# The first layers of a BERT, computed without its modules.
#
# A query of 30 tokens takes 1.5 ms of arithmetic in four small int8 layers and as much again in the dispatch of
# transformers' modules: too much where a router has 3 ms. The states are the same ones.


Product = Callable[[Tensor], Tensor]  # [..., in] -> [..., out]


def is_bert(model: Any) -> bool:
    """Whether `BertLayers` computes what this model does."""
    config = model.config
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    return config.model_type == "bert" and not config.is_decoder and positions == "absolute"


class BertLayers:
    """Token ids -> hidden states; the layers above `count` and the pooler are left out.

    Args:
        model: a BertModel for which `is_bert` holds.
        bits: 8 keeps the linear layers as int8, a scale a row, with inputs quantised a tensor at run time; only on the
            CPU.
    """

    def __init__(self, model: Any, count: int, bits: int = 32) -> None:
        place = model.embeddings
        self.device: torch.device = place.word_embeddings.weight.device
        self._words = place.word_embeddings.weight.detach()
        # All tokens are of type 0.
        types = place.token_type_embeddings.weight[0]
        self._positions = (place.position_embeddings.weight + types).detach()
        self._norm = _layer_norm(place.LayerNorm)
        self._heads: int = model.config.num_attention_heads
        self._bytes = sum(_size(part) for part in (self._words, self._positions, *self._norm[1:3]))
        self._layers = [self._layer(layer, bits) for layer in model.encoder.layer[:count]]

    def _layer(self, layer: Any, bits: int) -> tuple[Any, ...]:
        own, out = layer.attention.self, layer.attention.output
        asked = [own.query, own.key, own.value]
        qkv = torch.cat([part.weight for part in asked]), torch.cat([part.bias for part in asked])
        pairs = [qkv, *((part.weight, part.bias) for part in (out.dense, layer.intermediate.dense, layer.output.dense))]
        self._bytes += sum(weight.numel() * (1 if bits == 8 else 4) + _size(bias) for weight, bias in pairs)
        norms = _layer_norm(out.LayerNorm), _layer_norm(layer.output.LayerNorm)
        self._bytes += sum(_size(part) for norm in norms for part in norm[1:3])
        act = layer.intermediate.intermediate_act_fn
        return *(_product(weight.detach(), bias.detach(), bits) for weight, bias in pairs), *norms, act

    def nbytes(self) -> int:
        return self._bytes

    def __call__(self, ids: Tensor, real: Tensor | None, layers: Sequence[int]) -> list[Tensor]:
        """The states [batch, tokens, hidden] after each of `layers`; 0: before the first.

        Args:
            ids: [batch, tokens] int64.
            real: [batch, tokens] bool, which of them are no padding; None: all.
        """
        mask = None if real is None else real[:, None, None]
        x = embedding(ids, self._words) + self._positions[: ids.shape[1]]
        x = layer_norm(x, *self._norm)
        states = [x]
        for layer in self._layers[: max(layers)]:
            x = self._step(x, mask, layer)
            states.append(x)
        return [states[layer] for layer in layers]

    def _step(self, x: Tensor, mask: Tensor | None, layer: tuple[Any, ...]) -> Tensor:
        qkv, out, up, down, first, second, act = layer
        batch, tokens, hidden = x.shape
        q, k, v = qkv(x).view(batch, tokens, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, tokens, hidden)
        x = layer_norm(x + out(mixed), *first)
        return layer_norm(x + down(act(up(x))), *second)


def _layer_norm(norm: nn.LayerNorm) -> tuple[tuple[int, ...], Tensor, Tensor, float]:
    return tuple(norm.normalized_shape), norm.weight.detach(), norm.bias.detach(), norm.eps


def _product(weight: Tensor, bias: Tensor, bits: int) -> Product:
    if bits != 8:
        return lambda x: linear(x, weight, bias)
    scales = (weight.abs().amax(1) / 127).clamp_min(1e-9).double()
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the quantised tensor is announced to go; here it only feeds the kernel
        rounded = torch.quantize_per_channel(weight.float(), scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(rounded, bias.float())
    product = torch.ops.quantized.linear_dynamic
    return lambda x: product(x, packed)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# The first layers of a Llama or Mistral in float32, computed without their modules, on the same weights.
#
# Of a small base more than half of a query's time is the dispatch of transformers' modules. The states are the
# same.


_TYPES = ("llama", "mistral")
_ROPES = ("default", "linear", "llama3")  # whose angles depend on the position alone


def is_llama_like(model: Any) -> bool:
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
        model: the decoder without its head; `is_llama_like` holds.
        count: how many of its layers are wanted.
    """

    def __init__(self, model: Any, count: int) -> None:
        config = model.config
        self.window: int | None = getattr(config, "sliding_window", None)
        self._depth: int = config.num_hidden_layers
        self._words = model.embed_tokens.weight.detach()
        self._norm = _rms(model.norm)
        self._rotary = model.rotary_emb
        self._angles = torch.zeros(2, 0, 0)
        self._width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._layers = [_parts(layer) for layer in model.layers[:count]]

    def __call__(self, ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The states [batch, tokens, hidden] after each of `layers`; 0: before the first, depth: the model's output.

        Args:
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
        _rms(layer.input_layernorm),
        *map(_linear, projections),
        _rms(layer.post_attention_layernorm),
        *map(_linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
    )


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def _rms(module: Any) -> tuple[tuple[int, ...], Tensor, float]:
    return tuple(module.weight.shape), module.weight.detach(), module.variance_epsilon

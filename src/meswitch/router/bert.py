"""The first layers of a BERT, computed without its modules.

A query of 30 tokens takes 1.5 ms of arithmetic in four small int8 layers and as much again in the dispatch of
transformers' modules: too much where a router has 3 ms. The states are the same ones.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, linear, scaled_dot_product_attention

Product = Callable[[Tensor], Tensor]  # [..., in] -> [..., out]


def is_bert(model: Any) -> bool:
    """Whether `BertLayers` computes what this model does."""
    config = model.config
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    return config.model_type == "bert" and not config.is_decoder and positions == "absolute"


class BertLayers:
    """Token ids -> hidden states; the layers above `count` and the pooler are left out.

    Args:
        model: a BertModel for which `is_bert` holds. bits: 8 keeps the linear layers as int8, a scale a row, with
            inputs quantised a tensor at run time; only on the CPU.
    """

    def __init__(self, model: Any, count: int, bits: int = 32) -> None:
        place = model.embeddings
        self.device: torch.device = place.word_embeddings.weight.device
        self._words = place.word_embeddings.weight.detach()
        # All tokens are of type 0.
        types = place.token_type_embeddings.weight[0]
        self._positions = (place.position_embeddings.weight + types).detach()
        self._norm = _norm(place.LayerNorm)
        self._heads: int = model.config.num_attention_heads
        self._bytes = sum(_size(part) for part in (self._words, self._positions, *self._norm[1:3]))
        self._layers = [self._layer(layer, bits) for layer in model.encoder.layer[:count]]

    def _layer(self, layer: Any, bits: int) -> tuple[Any, ...]:
        own, out = layer.attention.self, layer.attention.output
        asked = [own.query, own.key, own.value]
        qkv = torch.cat([part.weight for part in asked]), torch.cat([part.bias for part in asked])
        pairs = [qkv, *((part.weight, part.bias) for part in (out.dense, layer.intermediate.dense, layer.output.dense))]
        self._bytes += sum(weight.numel() * (1 if bits == 8 else 4) + _size(bias) for weight, bias in pairs)
        norms = _norm(out.LayerNorm), _norm(layer.output.LayerNorm)
        self._bytes += sum(_size(part) for norm in norms for part in norm[1:3])
        act = layer.intermediate.intermediate_act_fn
        return *(_product(weight.detach(), bias.detach(), bits) for weight, bias in pairs), *norms, act

    def nbytes(self) -> int:
        return self._bytes

    def __call__(self, ids: Tensor, real: Tensor | None, layers: Sequence[int]) -> list[Tensor]:
        """The states [batch, tokens, hidden] after each of `layers`; 0: before the first.

        ids: [batch, tokens] int64. real: [batch, tokens] bool, which of them are no padding; None: all.
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


def _norm(norm: nn.LayerNorm) -> tuple[tuple[int, ...], Tensor, Tensor, float]:
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

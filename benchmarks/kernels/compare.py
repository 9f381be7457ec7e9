"""What users have today, on the same tokens: BitDelta's 1 bit and LoRA adapters, beside the same base."""

from dataclasses import dataclass

import torch

from benchmarks.kernels.shapes import DEVICE, Layer, random_layer
from meswitch.ops.routing import by_slot


def bitdelta(layer: Layer, experts: int) -> Layer:
    """The layer with deltas of 1 bit and a scale for all channels, run by our kernels."""
    rows, width = layer.weight.shape
    deltas = random_layer(layer.name, rows, width, 1, experts, group=0, salient=0, weight=layer.weight).deltas
    return Layer(layer.name, layer.weight, deltas)


@dataclass(frozen=True, slots=True)
class Lora:
    """a: [experts, in_features, rank]. b: [experts, rank, rows]."""

    a: torch.Tensor
    b: torch.Tensor

    @classmethod
    def random(cls, layer: Layer, rank: int, experts: int) -> "Lora":
        rows, width = layer.weight.shape
        a = torch.empty(experts, width, rank, device=DEVICE, dtype=torch.bfloat16).normal_(std=0.01)
        b = torch.empty(experts, rank, rows, device=DEVICE, dtype=torch.bfloat16).normal_(std=0.01)
        return cls(a, b)


@dataclass(frozen=True, slots=True)
class Places:
    """Tokens by expert, padded to the longest: gather [experts * longest] reads x, scatter writes y."""

    experts: int
    gather: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, token_slots: list[int]) -> "Places":
        segments = [tokens for _, tokens in sorted(by_slot(token_slots).items())]
        longest = max(len(segment) for segment in segments)
        gather = [t for s in segments for t in s + [0] * (longest - len(s))]
        scatter = [t for s in segments for t in s + [len(token_slots)] * (longest - len(s))]
        return cls(len(segments), torch.tensor(gather, device=DEVICE), torch.tensor(scatter, device=DEVICE))


def lora(layer: Layer, adapters: Lora, places: Places, x: dict, y: dict) -> None:
    """The base's product, then two batched products over the experts' gathered tokens: 5 kernels of torch.

    y: by rows, [tokens + 1, rows]: the last row takes the padding.
    """
    rows, width = layer.weight.shape
    tokens = len(x[width])
    torch.mm(x[width], layer.weight.T, out=y[rows][:tokens])
    gathered = x[width].index_select(0, places.gather).view(places.experts, -1, width)
    hidden = torch.bmm(gathered, adapters.a[: places.experts])
    added = torch.bmm(hidden, adapters.b[: places.experts])
    y[rows].index_add_(0, places.scatter, added.view(-1, rows))

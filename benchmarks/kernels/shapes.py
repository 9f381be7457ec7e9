"""The linear layers of real models, with random base weights and random packed deltas in the kernels' layout."""

from dataclasses import dataclass

import torch

from meswitch.codec import PackedDelta, pack
from meswitch.ops import SlotLinear
from meswitch.ops.layout import Shape, Variant, padded_salient

# layers, then [out_features, in_features] of one layer's linears: query, key and value in one, gate and up in one
MODELS = {
    "mistral-7b": (32, {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}),
    "llama-2-13b": (40, {"qkv": (15360, 5120), "o": (5120, 5120), "gate_up": (27648, 5120), "down": (5120, 13824)}),
    "qwen3-8b": (36, {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}),
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Layer:
    """weight: [rows, in_features] of the base. deltas: of all experts."""

    name: str
    weight: torch.Tensor
    deltas: SlotLinear


def delta_bytes(rows: int, in_features: int, bits: int, group: int = 128) -> int:
    """What a decode step must read of one expert's layer: codes, scales, salient weights as they are needed."""
    return rows * in_features * bits // 8 + rows * (in_features // group) * 2 + rows * (in_features // 512) * 2


def random_layer(
    name: str, rows: int, in_features: int, bits: int, experts: int, *, group=128, salient=None, weight=None
) -> Layer:
    """On the GPU; the deltas' codes are random bytes, their scales and salient weights small. By default one input
    channel in 512 is salient, as compression leaves them.
    """
    salient = in_features // 512 if salient is None else salient
    shape = Shape(rows, in_features, bits, group, padded_salient(salient))
    stride = -(-shape.nbytes // 256) * 256
    arena = torch.empty(experts * stride, dtype=torch.uint8, device=DEVICE)
    arena[: arena.numel() // 4 * 4].view(torch.int32).random_()
    table = []
    for e in range(experts):
        parts = shape.views(arena[e * stride :])
        parts["scale"].uniform_(5e-4, 1.5e-3)
        parts["index"].zero_()
        parts["salient"].zero_()
        if salient:
            drawn = torch.rand(len(parts["index"]), in_features, device=DEVICE).argsort(1)
            parts["index"][:, :salient] = drawn[:, :salient].sort(1).values
            parts["salient"][:, :salient].normal_(std=5e-3)
        table.append(shape.table_row(e * stride))
    if weight is None:
        weight = torch.empty(rows, in_features, dtype=torch.bfloat16, device=DEVICE).normal_(std=0.02)
    variant = Variant.of([shape])
    table = torch.tensor(table, dtype=torch.int64, device=DEVICE)
    return Layer(name, weight, SlotLinear.over(arena, table, rows, in_features, variant))


def random_delta(
    rows: int, in_features: int, bits: int, group: int | None, salient: int, device: str = DEVICE
) -> PackedDelta:
    """A delta as it is stored, by default on the GPU."""
    groups = 1 if group is None else -(-in_features // group)
    return PackedDelta(
        packed=pack(torch.randint(0, 2**bits, (rows, in_features), device=device), bits),
        scale=(torch.rand(rows, groups, device=device) * 0.01).bfloat16(),
        salient_index=torch.randperm(in_features, device=device)[:salient].sort().values.int(),
        salient_weight=(torch.randn(rows, salient, device=device) * 0.05).bfloat16(),
        bits=bits,
        group_size=group,
        in_features=in_features,
    )


def spread(name: str, tokens: int, experts: int, seed: int = 0) -> list[int]:
    """The expert of each token; every expert has one at least."""
    draw = torch.Generator().manual_seed(seed)
    experts = min(experts, tokens)
    rest = tokens - experts
    if name == "identical":
        return [0] * tokens
    if name == "distinct":
        return [t % experts for t in range(tokens)]
    weights = torch.ones(experts)
    if name == "zipf":
        weights = 1 / torch.arange(1, experts + 1)
    elif name == "skewed":
        weights[0] = 4.0 * experts
    elif name != "uniform":
        raise ValueError(name)
    drawn = torch.multinomial(weights, rest, replacement=True, generator=draw).tolist() if rest else []
    return [*range(experts), *drawn]

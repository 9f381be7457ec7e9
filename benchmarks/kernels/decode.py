"""Decode steps over all linears of a model: base, deltas, both in turn and fused, and what others would take."""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from benchmarks.kernels import compare
from benchmarks.kernels.shapes import DEVICE, MODELS, Layer, delta_bytes, random_layer, spread
from benchmarks.kernels.timing import graph_ms
from meswitch.ops import Routing, expert_linear, fused_linear
from meswitch.ops.layout import Variant
from meswitch.ops.routing import bucket
from meswitch.ops.triton.ahead import Compilation, decode_job, fused_job
from meswitch.ops.triton.items import choose_fused

SPREADS = ("identical", "uniform", "zipf", "skewed")
DISTINCT = [(b, e, "distinct") for b in (1, 8, 16, 32) for e in (1, 4, 8, 16) if e <= b]
SPREAD = [(32, 8, name) for name in SPREADS]
FEW = [(1, 1, "distinct"), (8, 4, "distinct"), (32, 8, "distinct")]
# model, bits, points; in the order in which they are measured
PLAN = [
    ("mistral-7b", 2, DISTINCT + SPREAD),
    ("qwen3-8b", 2, DISTINCT + SPREAD),
    ("llama-2-13b", 2, DISTINCT + SPREAD),
    *(("mistral-7b", bits, FEW) for bits in (1, 3, 4)),
]
DEPTH = 8  # layers with weights of their own; a step goes round them. The smallest linear's 8 are 268 MB: L2 has 50
SLOTS = 16


@dataclass(frozen=True)
class Model:
    """layers: of one step, flat. bitdelta: with 1 bit and a scale a row. known: milliseconds that points share."""

    name: str
    bits: int
    layers: list[Layer]
    bitdelta: list[Layer]
    loras: dict[int, list[compare.Lora]]
    known: dict = field(default_factory=dict)

    @classmethod
    def random(cls, name: str, bits: int) -> "Model":
        depth, shapes = MODELS[name]

        def step(own: list) -> list:
            width = len(shapes)
            return [own[(i % DEPTH) * width + j] for i in range(depth) for j in range(width)]

        layers = [random_layer(n, *shape, bits, SLOTS) for _ in range(DEPTH) for n, shape in shapes.items()]
        bitdelta, loras = [], {}
        if bits == 2:
            bitdelta = [compare.bitdelta(layer, SLOTS) for layer in layers]
            loras = {rank: [compare.Lora.random(layer, rank, SLOTS) for layer in layers] for rank in (16, 64)}
        return cls(name, bits, step(layers), step(bitdelta) if bitdelta else [], {r: step(w) for r, w in loras.items()})

    @cached_property
    def base_bytes(self) -> int:
        return sum(layer.weight.numel() * 2 for layer in self.layers)

    @cached_property
    def expert_bytes(self) -> int:
        return sum(delta_bytes(*layer.weight.shape, self.bits) for layer in self.layers)

    def base_ms(self, tokens: int) -> float:
        if ("base", tokens) not in self.known:
            x, y = inputs(self.layers, tokens), outputs(self.layers, tokens)
            self.known["base", tokens] = graph_ms(lambda: [base(layer, x, y) for layer in self.layers])
        value: float = self.known["base", tokens]
        return value


def inputs(layers: list[Layer], tokens: int) -> dict[int, torch.Tensor]:
    """By width."""
    widths = {layer.weight.shape[1] for layer in layers}
    return {width: torch.randn(tokens, width, device=DEVICE).bfloat16() for width in widths}


def outputs(layers: list[Layer], tokens: int) -> dict[int, torch.Tensor]:
    """By rows."""
    return {
        layer.weight.shape[0]: torch.zeros(tokens, layer.weight.shape[0], device=DEVICE).bfloat16() for layer in layers
    }


def base(layer: Layer, x: dict, y: dict) -> None:
    rows, width = layer.weight.shape
    torch.mm(x[width], layer.weight.T, out=y[rows])


def point(model: Model, batch: int, experts: int, name: str, copy: float) -> dict:
    """One decode step; milliseconds."""
    token_slots = spread(name, batch, experts)
    routing = Routing.build(token_slots, DEVICE)
    x, y = inputs(model.layers, batch), outputs(model.layers, batch)
    counts = [token_slots.count(slot) for slot in sorted(set(token_slots))]

    def delta(layer: Layer) -> None:
        rows, width = layer.weight.shape
        expert_linear(y[rows], x[width], layer.deltas, routing)

    def in_turn(layer: Layer) -> None:
        base(layer, x, y)
        delta(layer)

    def fused(layer: Layer) -> None:
        fused_linear(x[layer.weight.shape[1]], layer.weight, layer.deltas, routing)

    def step(one, layers: list[Layer]) -> float:
        return graph_ms(lambda: [one(layer) for layer in layers])

    base_ms, delta_ms = model.base_ms(batch), step(delta, model.layers)
    paths = {"fused": step(fused, model.layers), "in turn": step(in_turn, model.layers)}
    path = min(paths, key=lambda p: paths[p])
    ms = paths[path]
    merged = sum(model.base_ms(bucket(count)) for count in counts)
    floor = (model.base_bytes + len(counts) * model.expert_bytes) / copy / 1e6
    row = {
        "model": model.name,
        "bits": model.bits,
        "batch": batch,
        "experts": experts,
        "active": len(counts),
        "spread": name,
        "ms": ms,
        "path": path,
        "fused_ms": paths["fused"],
        "in_turn_ms": paths["in turn"],
        "base_ms": base_ms,
        "delta_ms": delta_ms,
        "delta_gb_s": len(counts) * model.expert_bytes / delta_ms / 1e6,
        "floor_ms": floor,
        "ratio_to_floor": ms / floor,
        "ratio_to_base": ms / base_ms,
        "layer_ms": ms / MODELS[model.name][0],
        "merged_ms": merged,
        "speedup_vs_merged": merged / ms,
    }
    if model.loras and name == "distinct":
        row["bitdelta_ms"] = step(fused, model.bitdelta)
        places = compare.Places.of(token_slots)
        wide = outputs(model.layers, batch + 1)  # the last row takes what padding adds
        for rank, loras in model.loras.items():
            pairs = list(zip(model.layers, loras, strict=True))
            row[f"lora{rank}_ms"] = graph_ms(lambda p=pairs: [compare.lora(*pair, places, x, wide) for pair in p])
    others = "".join(f" {key[:-3]} {row[key]:.2f}" for key in ("bitdelta_ms", "lora16_ms", "lora64_ms") if key in row)
    print(
        f"{model.name} {model.bits} bit B{batch:<2} E{experts:<2} {name:9} base {base_ms:.2f} delta {delta_ms:.2f} "
        f"({row['delta_gb_s'] / copy:.0%} of copy) fused {paths['fused']:.2f} in turn {paths['in turn']:.2f} "
        f"floor {floor:.2f} ratio {ms / floor:.2f} merged {merged / ms:.1f}x{others}",
        flush=True,
    )
    return row


def wanted() -> list[Compilation]:
    """What `compile_ahead` takes."""
    found = []
    for name, bits, points in PLAN:
        for batch, experts, kind in points:
            routing = Routing.build(spread(kind, batch, experts))
            count = routing.likely
            for rows, width in MODELS[name][1].values():
                variant = Variant(bits // 2, bits % 2 == 1, 128, 16)
                fused = choose_fused(rows, width, count, bucket(batch, 8), variant.planes)
                found.append(decode_job(rows, width, variant, torch.bfloat16, count, routing.piece))
                found.append(fused_job(rows, width, variant, torch.bfloat16, fused))
                if bits == 2 and kind == "distinct":
                    found.append(fused_job(rows, width, Variant(False, True, 0, 0), torch.bfloat16, fused))
    return found

"""Random deltas for the tests of ops, and what they add in fp64."""

import dataclasses

import torch

from meswitch.codec import PackedDelta, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
BACKENDS = ["triton", "reference", *(["cpu"] if DEVICE == "cpu" else [])]
SPREADS = {
    "identical": [0] * 6,
    "distinct": [0, 1, 2, 3],
    "uniform": [3, 0, 2, 1, 1, 3, 0, 2],
    "zipf": [0, 0, 0, 0, 1, 1, 2, 3],
    "skewed": [2] * 9 + [0],
    "with_base": [-1, 1, -1, 0, 1, -1],
}


def random_delta(rows, in_features, bits, group_size=64, salient=0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    groups = 1 if group_size is None else -(-in_features // group_size)
    return PackedDelta(
        packed=pack(torch.randint(0, 2**bits, (rows, in_features), generator=draw), bits),
        scale=(torch.rand(rows, groups, generator=draw) * 0.01).bfloat16(),
        salient_index=torch.randperm(in_features, generator=draw)[:salient].sort().values.int(),
        salient_weight=(torch.randn(rows, salient, generator=draw) * 0.05).bfloat16(),
        bits=bits,
        group_size=group_size,
        in_features=in_features,
    )


def in_one_arena(layers):
    """As an engine has them: every layer's deltas in one buffer, and counters of its own."""
    arena, found = torch.cat([layer.arena for layer in layers]), []
    first = 0
    for layer in layers:
        table, present = layer.table.clone(), layer.table[:, :2].any(1)
        table[present, 2:7] += first // 16
        found.append(dataclasses.replace(layer, arena=arena, table=table, arrived=layer.arrived.clone()))
        first += layer.arena.numel()
    return found


def expected(y, x, deltas, token_slots):
    """fp64, token by token."""
    y, x = y.double().cpu().clone(), x.double().cpu()
    for token, slot in enumerate(token_slots):
        if slot >= 0 and deltas[slot] is not None:
            y[token] += deltas[slot].dequantize().double() @ x[token]
    return y


def error(y, reference):
    return ((y.double().cpu() - reference).norm() / reference.norm()).item()

"""Embeddings of mixed batches against plain loops."""

import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.ops import SlotLinear, embedding_rows
from tests.support.deltas import DEVICE, random_delta


def slots_tensor(token_slots):
    return torch.tensor(token_slots, dtype=torch.int32, device=DEVICE)


def embedding_case(deltas, token_slots, *, extra_rows=0, dtype=torch.bfloat16, backend="triton"):
    """Returns the op's rows and the loop's, both float64 on the host."""
    layer = SlotLinear.build(deltas, DEVICE)
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn(layer.rows, layer.in_features, generator=draw).to(dtype)
    extra = torch.randn(len(deltas), extra_rows, layer.in_features, generator=draw).to(dtype) if extra_rows else None
    ids = torch.randint(0, layer.rows, (len(token_slots),), generator=draw)
    if extra is not None:
        ids[::3] = layer.rows + torch.arange(len(ids[::3])) % extra_rows
    expected = []
    for token, slot in zip(ids.tolist(), token_slots, strict=True):
        if token >= layer.rows:
            row = extra[slot, token - layer.rows].double() if slot >= 0 else torch.zeros(layer.in_features)
        else:
            row = weight[token].double()
            if slot >= 0 and deltas[slot] is not None:
                row = row + deltas[slot].dequantize(torch.tensor([token]))[0].double()
        expected.append(row)
    moved = None if extra is None else extra.to(DEVICE)
    rows = embedding_rows(ids.to(DEVICE), weight.to(DEVICE), layer, slots_tensor(token_slots), moved, backend)
    return rows.double().cpu(), torch.stack(expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_each_token_is_embedded_by_its_own_expert(bits, backend):
    deltas = [random_delta(60, 600, bits, salient=bits, seed=seed) for seed in range(3)]
    deltas[1] = None
    rows, expected = embedding_case(deltas, [0, -1, 2, 1, 0, 2, -1, 2], backend=backend)
    assert (rows - expected).norm() < 4e-3 * expected.norm()
    assert torch.equal(rows[1], expected[1])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rows_that_only_the_expert_has(backend):
    deltas = [random_delta(30, 256, 2, None, salient=2, seed=seed) for seed in range(2)]
    rows, expected = embedding_case(deltas, [0, 1, 1, 0, 1, 1, -1], extra_rows=4, backend=backend)
    assert torch.equal(rows[::3], expected[::3].to(rows.dtype))
    assert (rows - expected).norm() < 4e-3 * expected.norm()


def test_refusals_of_embeddings():
    layer = SlotLinear.build([random_delta(16, 256, 2)], DEVICE)
    weight, ids = torch.zeros(16, 256, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ConfigError, match=r"backend: 'metal' has no embedding_rows"):
        embedding_rows(ids, weight, layer, slots_tensor([0, 0]), backend="metal")
    with pytest.raises(ConfigError, match="shapes: 2 ids, 1 slots"):
        embedding_rows(ids, weight, layer, slots_tensor([0]))
    with pytest.raises(ConfigError, match="extra: "):
        embedding_rows(ids, weight, layer, slots_tensor([0, 0]), torch.zeros(1, 2, 256).half().to(DEVICE))


def test_the_operator_is_registered_with_its_schema_and_fake_kernel():
    layer = SlotLinear.build([random_delta(16, 256, 2)], DEVICE)
    weight, ids = torch.zeros(16, 256, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    v = layer.variant
    args = (ids, slots_tensor([0, -1]), weight, weight, 0, layer.arena, layer.table)
    rest = (v.two, v.one, v.group, v.salient, "reference")
    torch.library.opcheck(torch.ops.meswitch.embedding_rows.default, (*args, *rest))

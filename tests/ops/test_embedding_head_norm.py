"""Embeddings, heads and norms of mixed batches against plain loops."""

import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.ops import Routing, SlotLinear, embedding_rows, head_logits, rms_norm
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


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_logits_of_vocabularies_of_different_size(backend):
    deltas = [random_delta(50, 256, 2, salient=2, seed=seed) for seed in range(3)]
    layer = SlotLinear.build(deltas, DEVICE)
    draw = torch.Generator().manual_seed(4)
    token_slots, sizes = [0, -1, 1, 2, 0, 1], [48, 53, 50, 50]
    x = torch.randn(6, 256, generator=draw).bfloat16()
    weight, extra = torch.randn(50, 256, generator=draw).bfloat16(), torch.randn(3, 3, 256, generator=draw).bfloat16()
    logits = head_logits(
        *(x.to(DEVICE), weight.to(DEVICE), layer, Routing.build(token_slots, DEVICE), slots_tensor(token_slots)),
        *(slots_tensor(sizes), extra.to(DEVICE), backend),
    ).cpu()
    assert logits.shape == (6, 53)
    for row, token, slot in zip(logits.double(), x.double(), token_slots, strict=True):
        whole = weight.double() + (0 if slot < 0 else deltas[slot].dequantize().double())
        if slot >= 0:
            whole = torch.cat([whole, extra[slot].double()])
        size = sizes[slot]
        expected = whole[:size] @ token
        assert (row[:size] - expected).norm() < 1e-2 * expected.norm()
        assert (row[size:] == -torch.inf).all()


def test_a_head_without_extra_rows():
    layer = SlotLinear.build([random_delta(40, 256, 2)], DEVICE)
    x, weight = torch.ones(2, 256, device=DEVICE).bfloat16(), torch.ones(40, 256, device=DEVICE).bfloat16()
    slots = [-1, 0]
    logits = head_logits(
        x, weight, layer, Routing.build(slots, DEVICE), slots_tensor(slots), slots_tensor([38, 40]), backend="triton"
    )
    assert (logits[0] == 256).all()
    assert logits[1, :38].isfinite().all()
    assert (logits[1, 38:] == -torch.inf).all()


@pytest.mark.parametrize("shape", [(5, 32), (5, 3, 32)])
def test_each_token_is_normalised_with_its_own_weights(shape):
    x = torch.randn(shape, device=DEVICE).bfloat16()
    weights = torch.randn(4, 32, device=DEVICE).bfloat16()
    token_slots = [2, -1, 0, 0, 1]
    y = rms_norm(x, weights, slots_tensor(token_slots), 1e-6)
    for row, values, slot in zip(y, x, token_slots, strict=True):
        expected = torch.nn.functional.rms_norm(values.float(), (32,), weights[slot].float(), 1e-6)
        assert (row.float() - expected).norm() < 1e-2 * expected.norm()


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

"""The Triton kernel and the reference against fp64: on a GPU where there is one, else in Triton's interpreter."""

import dataclasses

import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.ops import Routing, SlotLinear, expert_linear
from meswitch.ops.backend import slot_matrix
from meswitch.ops.layout import read_slot
from meswitch.ops.triton.items import choose
from tests.support.deltas import BACKENDS, DEVICE, SPREADS, TOLERANCE, error, expected, random_delta


def inputs(tokens, layer, dtype, mean=0.0):
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, layer.in_features, generator=draw) + mean
    y = torch.randn(tokens, layer.rows, generator=draw)
    return x.to(DEVICE, dtype), y.to(DEVICE, dtype)


def run(deltas, token_slots, *, dtype=torch.bfloat16, mean=0.0, backend="triton"):
    layer = SlotLinear.build(deltas, DEVICE)
    x, y = inputs(len(token_slots), layer, dtype, mean)
    reference = expected(y, x, deltas, token_slots)
    return error(expert_linear(y, x, layer, Routing.build(token_slots, DEVICE), backend), reference)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_spread_of_tokens_over_experts(spread, backend):
    deltas = [random_delta(96, 512, 2, salient=4, seed=seed) for seed in range(4)]
    assert run(deltas, SPREADS[spread], backend=backend) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "in_features"), [(64, 512), (37, 100), (130, 1100)])
def test_every_bit_width_and_odd_sizes(bits, rows, in_features):
    deltas = [random_delta(rows, in_features, bits, salient=bits, seed=seed) for seed in range(2)]
    assert run(deltas, [0, 1, 0]) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("bits", "rows", "in_features"), [(1, 37, 100), (3, 64, 512)])
def test_every_dtype(bits, rows, in_features, dtype):
    deltas = [random_delta(rows, in_features, bits, salient=bits, seed=seed) for seed in range(2)]
    assert run(deltas, [0, 1, 0], dtype=dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("group_size", [16, 32, 128, 256, 512, 1024, None])
@pytest.mark.parametrize("bits", [1, 2])
def test_group_sizes_below_at_and_above_a_block(bits, group_size):
    assert run([random_delta(48, 1024, bits, group_size)], [0, 0]) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("salient", [0, 1, 8, 17])
def test_salient_channels(salient):
    deltas = [
        random_delta(40, 256, 2, salient=salient),
        random_delta(40, 256, 2, seed=1),
        random_delta(40, 256, 2, salient=3, seed=2),
    ]
    assert run(deltas, [0, 1, 2, 0]) < TOLERANCE[torch.bfloat16]


def test_experts_of_different_bits_and_one_without_a_change_share_a_batch():
    deltas = [*(random_delta(70, 600, bits, salient=bits, seed=bits) for bits in (1, 2, 3, 4)), None]
    assert run(deltas, [4, 3, 2, 1, 0, 4, 3]) < TOLERANCE[torch.bfloat16]


def test_inputs_with_a_large_mean_do_not_cancel():
    assert run([random_delta(64, 1024, 2, None)], [0, 0], mean=30.0) < TOLERANCE[torch.bfloat16]


def test_input_channels_are_split_among_programs():
    deltas = [random_delta(40, 4096, bits, 128, salient=2, seed=bits) for bits in (2, 3)]
    for _ in range(2):  # the counters are zero again after a launch
        assert run(deltas, [0, 1, 1]) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("group", [None, 32, 64])
def test_more_codes_in_a_dot_and_whole_tiles_give_the_same(group):
    from meswitch.ops.triton.decode import decode

    deltas = [random_delta(150, 1024, bits, group, salient=2, seed=bits) for bits in (2, 3)]
    layer = SlotLinear.build(deltas, DEVICE)
    x, y = inputs(5, layer, torch.bfloat16)
    routing = Routing.build([0, 1, 1, -1, 0], DEVICE)
    sums = expected(y, x, deltas, [0, 1, 1, -1, 0])
    plain = dataclasses.replace(choose(150, 1024, 2, 8), split=1, whole=0, join=1)
    for split, whole, join in [(1, 0, 4), (2, 1, 2), (2, 1, 1)]:
        got = y.clone()
        decode(got, x, layer, routing, dataclasses.replace(plain, split=split, whole=whole, join=join))
        assert error(got, sums) < TOLERANCE[torch.bfloat16]


def test_a_launch_that_fills_the_chip_once_and_a_bit_splits_its_last_tiles():
    assert choose(28672, 4096, 4, 8).whole * 4 <= 792
    assert choose(28672, 4096, 4, 8).split == 4
    assert choose(28672, 4096, 16, 8).whole == choose(4096, 4096, 4, 8).whole == 0


def test_a_token_gets_the_same_bits_whoever_shares_its_batch():
    deltas = [random_delta(40, 2048, 2, 128, salient=2, seed=seed) for seed in range(4)]
    layer = SlotLinear.build(deltas, DEVICE)
    x, y = inputs(8, layer, torch.bfloat16)

    def outputs(token_slots):
        return expert_linear(y.clone(), x, layer, Routing.build(token_slots, DEVICE, pieces=4), "triton")

    alone, mixed = outputs([-1, 2, -1, -1, -1, -1, -1, -1]), outputs([0, 2, 3, 1, 2, 2, 2, 0])
    assert torch.equal(alone[1], mixed[1])
    assert torch.equal(alone[0], y[0])


def test_memory_that_no_token_owns_is_left_alone():
    layer = SlotLinear.build([random_delta(50, 300, 2)], DEVICE)
    x, _ = inputs(3, layer, torch.bfloat16)
    poisoned = torch.full((5, 64), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    poisoned[1:4, :50] = 0
    expert_linear(poisoned[1:4, :50], x, layer, Routing.build([0, -1, 0], DEVICE), "triton")
    assert poisoned[1:4, :50].isfinite().all()
    assert poisoned[0].isnan().all()
    assert poisoned[4].isnan().all()
    assert poisoned[:, 50:].isnan().all()
    assert (poisoned[2, :50] == 0).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_layout_loses_nothing(bits):
    delta = random_delta(33, 700, bits, 64, salient=3)
    layer = SlotLinear.build([None, delta])
    back = read_slot(layer.arena, layer.table[1].tolist(), 33, 700, layer.variant.group)
    assert torch.equal(back.packed, delta.packed)
    assert torch.equal(back.dequantize(), delta.dequantize())
    assert read_slot(layer.arena, layer.table[0].tolist(), 33, 700, layer.variant.group) is None


@pytest.mark.skipif(DEVICE != "cpu", reason="the backend computes on a CPU")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "in_features"), [(64, 512), (37, 100), (130, 1100)])
@pytest.mark.parametrize("group_size", [16, 64, None])
def test_the_cpu_backend_restores_every_delta_exactly(bits, rows, in_features, group_size):
    delta = random_delta(rows, in_features, bits, group_size, salient=bits - 1)
    layer = SlotLinear.build([None, delta])
    matrices = [slot_matrix(layer.arena, row, rows, in_features, layer.variant.group) for row in layer.table.tolist()]
    assert matrices[0] is None
    assert torch.equal(matrices[1], delta.dequantize())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs another device")
def test_the_cpu_backend_refuses_other_devices():
    layer = SlotLinear.build([random_delta(8, 96, 2)], DEVICE)
    x, y = inputs(1, layer, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"backend: 'cpu' computes on a CPU.*use 'triton'"):
        expert_linear(y, x, layer, Routing.build([0], DEVICE), "cpu")


def test_any_number_of_tokens_of_an_expert_and_any_dtype_by_default_on_a_cpu():
    deltas = [random_delta(48, 256, 2, salient=2, seed=seed) for seed in range(2)]
    layer = SlotLinear.build(deltas)
    x, y = torch.randn(200, 256), torch.randn(200, 48)
    slots = [0, 1, 1, -1] * 50
    wanted = expected(y, x, deltas, slots)
    assert error(expert_linear(y, x, layer, Routing.build(slots)), wanted) < 1e-5


def test_refusals_name_the_backend_that_serves_the_case():
    with pytest.raises(ConfigError, match=r"group_size: 48.*'reference' serves"):
        SlotLinear.build([random_delta(8, 96, 2, 48)])
    with pytest.raises(ConfigError, match=r"one layer's experts have .*'reference' serves"):
        SlotLinear.build([random_delta(8, 256, 2, 64), random_delta(8, 256, 2, 128)])
    layer = SlotLinear.build([random_delta(8, 96, 2)], DEVICE)
    x, y = inputs(65, layer, torch.float32)
    with pytest.raises(ConfigError, match=r"dtype: .*'reference' serves"):
        expert_linear(y, x, layer, Routing.build([0] * 65, DEVICE), "triton")
    with pytest.raises(ConfigError, match=r"pieces of 128 tokens.*'reference' serves"):
        expert_linear(y.half(), x.half(), layer, Routing.build([0] * 65, DEVICE, piece=128), "triton")


def test_the_operator_is_registered_with_its_schema_and_fake_kernel():
    deltas = [random_delta(24, 256, 2, salient=1), None]
    layer = SlotLinear.build(deltas, DEVICE)
    x, y = inputs(3, layer, torch.bfloat16)
    r, v = Routing.build([0, 1, -1], DEVICE), layer.variant
    args = (
        y,
        x,
        layer.arena,
        layer.table,
        layer.arrived,
        r.slots,
        r.starts,
        r.order,
        r.piece,
        r.likely,
        v.two,
        v.one,
        v.group,
        v.salient,
    )
    torch.library.opcheck(torch.ops.meswitch.expert_linear.default, (*args, "reference"))

"""The fused kernel and its reference against fp64: on a GPU where there is one, else in Triton's interpreter."""

import dataclasses

import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.ops import Routing, SlotLinear, fused_linear
from meswitch.ops.triton.items import choose_fused
from tests.support.deltas import BACKENDS, DEVICE, SPREADS, TOLERANCE, error, expected, random_delta


def inputs(tokens, layer, dtype, mean=0.0):
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, layer.in_features, generator=draw) + mean
    weight = torch.randn(layer.rows, layer.in_features, generator=draw) * 0.05
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def run(deltas, token_slots, *, dtype=torch.bfloat16, mean=0.0, bias=False, backend="triton"):
    layer = SlotLinear.build(deltas, DEVICE)
    x, weight = inputs(len(token_slots), layer, dtype, mean)
    offset = torch.linspace(-1, 1, layer.rows).to(DEVICE, dtype) if bias else None
    base = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    y = fused_linear(x, weight, layer, Routing.build(token_slots, DEVICE), offset, backend)
    assert not layer.arrived.any()
    return error(y, expected(base, x, deltas, token_slots))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_spread_of_tokens_over_experts(spread, backend):
    deltas = [random_delta(96, 512, 2, salient=4, seed=seed) for seed in range(4)]
    assert run(deltas, SPREADS[spread], backend=backend) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "in_features"), [(64, 512), (37, 100), (130, 1100)])
def test_every_bit_width_and_odd_sizes(bits, rows, in_features):
    deltas = [random_delta(rows, in_features, bits, salient=bits, seed=seed) for seed in range(2)]
    assert run(deltas, [0, 1, 0], bias=True) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("bits", "rows", "in_features"), [(1, 37, 100), (3, 64, 512)])
def test_every_dtype(bits, rows, in_features, dtype):
    deltas = [random_delta(rows, in_features, bits, salient=bits, seed=seed) for seed in range(2)]
    assert run(deltas, [0, 1, 0], dtype=dtype, bias=True) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 8, 9, 17, 33, 64])
def test_every_bucket_of_tokens(tokens):
    deltas = [random_delta(40, 1100, 2, salient=2, seed=seed) for seed in range(3)]
    assert run(deltas, [t % 4 - 1 for t in range(tokens)]) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_many_tokens_of_one_expert(tokens):
    assert run([random_delta(140, 1024, 2, 128, salient=2)], [0] * tokens) < TOLERANCE[torch.bfloat16]


def test_experts_of_different_bits_and_one_without_a_change_share_a_batch():
    deltas = [*(random_delta(70, 4200, bits, salient=bits, seed=bits) for bits in (1, 2, 3, 4)), None]
    assert run(deltas, [4, 3, -1, 2, 1, 0, 4, 3, -1]) < TOLERANCE[torch.bfloat16]


def test_a_step_without_experts_is_the_base():
    assert run([random_delta(64, 512, 2)], [-1, -1, -1]) < TOLERANCE[torch.bfloat16]


def test_inputs_with_a_large_mean_do_not_cancel():
    assert run([random_delta(64, 1024, 2, None)], [0, 0], mean=30.0) < TOLERANCE[torch.bfloat16]


def test_a_token_gets_the_same_bits_whoever_shares_its_batch():
    deltas = [random_delta(40, 2048, 2, 128, salient=2, seed=seed) for seed in range(4)]
    layer = SlotLinear.build(deltas, DEVICE)
    x, weight = inputs(8, layer, torch.bfloat16)

    def outputs(token_slots):
        return fused_linear(x, weight, layer, Routing.build(token_slots, DEVICE, pieces=4), None, "triton")

    alone, mixed = outputs([-1, 2, -1, -1, -1, -1, -1, -1]), outputs([0, 2, 3, -1, 2, 2, 2, 0])
    assert torch.equal(alone[1], mixed[1])
    assert torch.equal(alone[3], mixed[3])


def test_every_output_is_written_and_nothing_else():
    from meswitch.ops.triton.fused import fused

    layer = SlotLinear.build([random_delta(50, 300, 2), None], DEVICE)
    x, weight = inputs(4, layer, torch.bfloat16)
    poisoned = torch.full((6, 64), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    fused([poisoned[1:5, :50]], x, [weight], [None], [layer], Routing.build([0, -1, 1, 0], DEVICE))
    assert poisoned[1:5, :50].isfinite().all()
    assert poisoned[0].isnan().all()
    assert poisoned[5].isnan().all()
    assert poisoned[:, 50:].isnan().all()


def test_the_order_in_which_items_start_changes_nothing():
    from meswitch.ops.triton.fused import fused

    layer = SlotLinear.build([random_delta(150, 1024, 2, seed=seed) for seed in range(2)], DEVICE)
    x, weight = inputs(5, layer, torch.bfloat16)
    routing = Routing.build([0, -1, 1, 0, 1], DEVICE)
    chosen = choose_fused(150, 1024, 2, 8)
    found = []
    for before, every in [(1.0, 1), (0.5, 1), (0.0, 2)]:
        y = torch.full((5, 150), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        config = dataclasses.replace(chosen, before=before, every=every)
        fused([y], x, [weight], [None], [layer], routing, config)
        found.append(y)
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_slices_of_wider_tensors_are_read_by_their_strides():
    delta = random_delta(64, 512, 2)
    layer = SlotLinear.build([delta], DEVICE)
    x, weight = inputs(3, layer, torch.bfloat16)
    wide_x, wide_weight = torch.full((3, 600), float("nan")), torch.full((64, 700), float("nan"))
    wide_x, wide_weight = wide_x.to(DEVICE, torch.bfloat16), wide_weight.to(DEVICE, torch.bfloat16)
    wide_x[:, :512], wide_weight[:, :512] = x, weight
    routing = Routing.build([0, -1, 0], DEVICE)
    y = fused_linear(wide_x[:, :512], wide_weight[:, :512], layer, routing, None, "triton")
    assert torch.equal(y, fused_linear(x, weight, layer, routing, None, "triton"))


def test_refusals_name_what_serves_the_case():
    layer = SlotLinear.build([random_delta(8, 96, 2)], DEVICE)
    x, weight = inputs(65, layer, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"65 tokens .*expert_linear.*'reference'"):
        fused_linear(x, weight, layer, Routing.build([-1] * 65, DEVICE), None, "triton")
    with pytest.raises(ConfigError, match=r"dtype: .*'reference' serves"):
        fused_linear(x[:3].float(), weight, layer, Routing.build([0] * 3, DEVICE), None, "triton")
    with pytest.raises(ConfigError, match=r"shapes: .*4 routed tokens"):
        fused_linear(x[:3], weight, layer, Routing.build([0] * 4, DEVICE), None, "triton")


def test_the_operator_is_registered_with_its_schema_and_fake_kernel():
    layer = SlotLinear.build([random_delta(24, 256, 2, salient=1), None], DEVICE)
    x, weight = inputs(3, layer, torch.bfloat16)
    r, v = Routing.build([0, 1, -1], DEVICE), layer.variant
    places = layer.arena, layer.table, layer.arrived, r.slots, r.starts, r.order, r.piece, r.likely
    args = (x, weight, None, None, *places, v.two, v.one, v.group, v.salient, "reference")
    torch.library.opcheck(torch.ops.meswitch.fused_linear.default, args)
    codes = torch.ones(24, 256, dtype=torch.int8, device=DEVICE), torch.ones(24, device=DEVICE)
    torch.library.opcheck(torch.ops.meswitch.fused_linear.default, (x, *codes, *args[3:]))


@pytest.mark.parametrize("likely", [1, 2, 3])
def test_a_routing_of_more_pieces_than_it_has_as_a_rule(likely):
    """Programs are as many as for the likely pieces; each takes several."""
    deltas = [random_delta(130, 1024, 2, salient=2, seed=seed) for seed in range(3)]
    token_slots = [0] * 17 + [1] * 3 + [-1] * 2 + [2] * 4
    layer = SlotLinear.build(deltas, DEVICE)
    x, weight = inputs(len(token_slots), layer, torch.bfloat16)
    routing = dataclasses.replace(Routing.build(token_slots, DEVICE), likely=likely)
    y = fused_linear(x, weight, layer, routing)
    assert not layer.arrived.any()
    assert error(y, expected(x.double() @ weight.double().T, x, deltas, token_slots)) < TOLERANCE[torch.bfloat16]

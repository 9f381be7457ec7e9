"""A whole layer for long segments against fp64: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.ops import PrefillRouting, SlotLinear, expert_prefill
from meswitch.ops.prefill import block_rows
from meswitch.ops.routing import LONG_FROM
from tests.support.deltas import DEVICE, random_delta

LONG = 8  # here; where the decode kernel ends is a matter of speed


def expected(x, weight, deltas, token_slots, bias):
    """fp64, token by token."""
    rows = []
    for own, slot in zip(x.double().cpu(), token_slots, strict=True):
        merged = weight.double().cpu()
        if slot >= 0 and deltas[slot] is not None:
            merged = merged + deltas[slot].dequantize().double()
        rows.append(merged @ own + (0 if bias is None else bias.double().cpu()))
    return torch.stack(rows)


def prefill_error(deltas, token_slots, *, dtype=torch.bfloat16, with_bias=False, backend="triton", **options):
    layer = SlotLinear.build(deltas, DEVICE)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(len(token_slots), layer.in_features, generator=draw).to(DEVICE, dtype)
    weight = (torch.randn(layer.rows, layer.in_features, generator=draw) * 0.02).to(DEVICE, dtype)
    bias = torch.randn(layer.rows, generator=draw).to(DEVICE, dtype) if with_bias else None
    routing = PrefillRouting.build(token_slots, DEVICE, own_from=LONG)
    y = expert_prefill(x, weight, layer, routing, bias, backend=backend, **options)
    reference = expected(x, weight, deltas, token_slots, bias)
    return ((y.double().cpu() - reference).norm() / reference.norm()).item()


STEPS = {
    "one_expert": [0] * 20,
    "base_only": [-1] * 5,
    "side_by_side": [2] * 9 + [0] * 12 + [-1] * 4,
    "base_between": [0] * 9 + [-1] * 3 + [1] * 8,
    "scattered": [0, 1, -1, 2] * 9,
    "long_and_short": [0] * 10 + [1] * 3 + [2] * 2 + [-1] * 2 + [3] * 11,
    "only_short": [0, 1, 1, -1, 3],
    "six_long": [5, 4, 3, 2, 1, 0] * LONG,
}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("step", STEPS)
def test_every_step_of_tokens(step, backend):
    deltas = [random_delta(48, 256, 2, salient=2, seed=seed) for seed in range(6)]
    deltas[3] = None
    assert prefill_error(deltas, STEPS[step], backend=backend) < 1e-2


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_bit_width_at_odd_sizes_in_blocks_of_rows(bits, with_bias):
    deltas = [random_delta(300, 100, bits, salient=1, seed=seed) for seed in range(2)]
    assert prefill_error(deltas, [0] * 9 + [1] * 8 + [-1], with_bias=with_bias, scratch=1) < 1e-2


def test_fp16():
    assert prefill_error([random_delta(32, 256, 2)], [0] * 9, dtype=torch.float16) < 2e-3


def test_the_reference_serves_fp32():
    assert prefill_error([random_delta(32, 256, 2)], [0] * 9 + [-1], dtype=torch.float32, backend="reference") < 1e-5


def test_a_short_segment_of_more_tokens_than_the_decode_kernel_takes():
    deltas = [random_delta(40, 256, 2, salient=1)]
    layer = SlotLinear.build(deltas, DEVICE)
    x = torch.randn(150, 256, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    weight = torch.zeros(40, 256, device=DEVICE).bfloat16()
    routing = PrefillRouting.build([0] * 150, DEVICE, own_from=200)
    assert routing.short.slots.tolist() == [0, 0, 0]
    y = expert_prefill(x, weight, layer, routing, backend="triton")
    reference = expected(x, weight, deltas, [0] * 150, None)
    assert (y.double().cpu() - reference).norm() < 1e-2 * reference.norm()


def test_a_sorted_step_is_not_copied():
    assert PrefillRouting.build([2, 2, 0, -1, -1, 1]).order is None
    assert PrefillRouting.build([0, 1, 0]).order.tolist() == [0, 2, 1]


def test_tokens_that_use_the_bases_weights_are_multiplied_together():
    routing = PrefillRouting.build([0] * 3 + [-1] * 2 + [1] * 8 + [2] + [3], own_from=8)
    assert routing.plain == ((0, 5), (13, 15))
    assert routing.own == ((5, 13),)


def test_long_segments_come_first_and_only_the_others_have_tiles():
    slots = [0] * 300 + [1] * LONG_FROM + [2] * 200
    routing = PrefillRouting.build(slots, own_from=200)
    assert routing.own == ((300, 300 + LONG_FROM), (0, 300), (300 + LONG_FROM, len(slots)))
    assert routing.own_slots.tolist() == [1, 0, 2]
    assert routing.long == 1
    assert routing.tiles[1:, 1:].tolist() == [[0, 300, 0], [0, 300, 0], [300 + LONG_FROM, len(slots), 2]]


def test_layers_that_merge_leave_more_to_the_decode_kernel(monkeypatch):
    slots = [0] * 100 + [1] * 300
    assert PrefillRouting.build(slots, own_from=64).merging.own == ((0, 100), (100, 400))  # asked for
    monkeypatch.setattr("meswitch.ops.routing.on_hopper", lambda device: True)
    routing = PrefillRouting.build(slots)
    assert (routing.own, routing.short) == (((0, 100), (100, 400)), None)
    merging = routing.merging
    assert (merging.own, merging.plain) == (((100, 400),), ((0, 100),))
    assert routing.merging is merging
    assert PrefillRouting.build([0] * 300).merging.own == ((0, 300),)


def test_a_step_that_is_only_long_has_no_tiles():
    assert PrefillRouting.build([0] * LONG_FROM).tiles.shape == (1, 4)


def test_blocks_of_rows_are_whole_waves_within_the_scratch_memory():
    assert block_rows(4096, 4096, 1, 1 << 30) == 4096
    assert block_rows(28672, 4096, 4, 512 << 20) == 14336
    assert block_rows(28672, 4096, 4, 96 << 20) == 2048
    assert block_rows(28672, 4096, 4, 1) == 256


def test_refusals():
    layer = SlotLinear.build([random_delta(16, 256, 2)], DEVICE)
    routing = PrefillRouting.build([0] * 9, DEVICE, own_from=8)
    x, weight = torch.zeros(9, 256, device=DEVICE), torch.zeros(16, 256, device=DEVICE)
    with pytest.raises(ConfigError, match=r"dtype: .*'reference' serves"):
        expert_prefill(x, weight, layer, routing, backend="triton")
    with pytest.raises(ConfigError, match=r"backend: 'metal' has no merge"):
        expert_prefill(x, weight, layer, routing, backend="metal")
    with pytest.raises(ConfigError, match="shapes: x"):
        expert_prefill(x, weight[:8], layer, routing)

"""`W + D` against fp64: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.ops import SlotLinear
from meswitch.ops.prefill import merged_rows
from tests.support.deltas import DEVICE, random_delta


def merged_error(deltas, slots, *, first=0, last=None, dtype=torch.bfloat16, backend="triton"):
    """The largest difference of any weight from fp64, in units of the dtype's rounding."""
    layer = SlotLinear.build(deltas, DEVICE)
    last = layer.rows if last is None else last
    weight = (torch.randn(layer.rows, layer.in_features, generator=torch.Generator().manual_seed(5)) * 0.1).to(dtype)
    out = torch.full((len(slots), last - first, layer.in_features), float("nan"), dtype=dtype, device=DEVICE)
    slots_on_device = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    merged_rows(weight.to(DEVICE), layer, slots_on_device, first, last, out, backend)
    expected = torch.stack(
        [weight.double() + (0 if deltas[slot] is None else deltas[slot].dequantize().double()) for slot in slots]
    )[:, first:last]
    spacing = expected.abs().clamp(min=1e-3) * torch.finfo(dtype).eps
    return ((out.double().cpu() - expected).abs() / spacing).max().item()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "in_features"), [(32, 512), (37, 100), (50, 1100)])
def test_every_bit_width_and_odd_sizes(bits, rows, in_features, backend):
    deltas = [random_delta(rows, in_features, bits, salient=bits, seed=seed) for seed in range(2)]
    assert merged_error(deltas, [1, 0], backend=backend) <= 1


@pytest.mark.parametrize("group_size", [16, 32, 128, 256, 512, 1024, None])
def test_group_sizes_below_at_and_above_a_tile(group_size):
    assert merged_error([random_delta(16, 1100, 2, group_size)], [0]) <= 1


@pytest.mark.parametrize("salient", [0, 1, 17])
def test_salient_channels(salient):
    assert merged_error([random_delta(32, 600, 2, salient=salient), random_delta(32, 600, 2, seed=1)], [0, 1]) <= 1


def test_a_salient_first_channel_is_told_from_padding():
    delta = random_delta(16, 512, 2, salient=3)
    delta.salient_index.copy_(torch.tensor([0, 1, 300]))
    assert merged_error([delta], [0]) <= 1


def test_experts_of_different_bits_and_one_without_a_change():
    deltas = [*(random_delta(40, 600, bits, salient=bits, seed=bits) for bits in (1, 2, 3, 4)), None]
    assert merged_error(deltas, [4, 3, 2, 1, 0, 4]) <= 1


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_range_of_rows(backend):
    deltas = [random_delta(100, 512, bits, salient=2, seed=bits) for bits in (2, 3)]
    assert merged_error(deltas, [0, 1], first=32, last=80, backend=backend) <= 1
    assert merged_error(deltas, [0, 1], first=64, last=100, backend=backend) <= 1


def test_fp16():
    assert merged_error([random_delta(32, 512, 2, salient=2)], [0], dtype=torch.float16) <= 1


def test_a_weight_with_rows_apart_and_memory_after_the_result():
    delta = random_delta(20, 300, 2)
    layer = SlotLinear.build([delta], DEVICE)
    weight = torch.randn(20, 320, device=DEVICE).bfloat16()[:, :300]
    buffer = torch.full((2, 20, 300), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    merged_rows(weight, layer, torch.zeros(1, dtype=torch.int32, device=DEVICE), 0, 20, buffer[:1], "triton")
    expected = weight.double().cpu() + delta.dequantize().double()
    assert (buffer[0].double().cpu() - expected).norm() < 1e-2 * expected.norm()
    assert buffer[1].isnan().all()


def test_refusals():
    layer = SlotLinear.build([random_delta(16, 256, 2)], DEVICE)
    weight, out = torch.zeros(16, 256, device=DEVICE), torch.zeros(1, 16, 256, device=DEVICE)
    slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ConfigError, match=r"dtype: .*'reference' serves"):
        merged_rows(weight, layer, slots, 0, 16, out, "triton")
    with pytest.raises(ConfigError, match=r"backend: 'metal' has no merge"):
        merged_rows(weight, layer, slots, 0, 16, out, "metal")
    with pytest.raises(ConfigError, match="shapes: weight"):
        merged_rows(weight[:, :128], layer, slots, 0, 16, out)
    with pytest.raises(ConfigError, match="out: "):
        merged_rows(weight, layer, slots, 0, 15, out)


def test_the_operator_is_registered_with_its_schema_and_fake_kernel():
    layer = SlotLinear.build([random_delta(16, 256, 2)], DEVICE)
    weight, out = torch.zeros(16, 256, device=DEVICE), torch.zeros(1, 16, 256, device=DEVICE)
    v = layer.variant
    slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    args = (out, weight, layer.arena, layer.table, slots, 0, 16, v.two, v.one, v.group, v.salient)
    torch.library.opcheck(torch.ops.meswitch.merge.default, (*args, "reference"))

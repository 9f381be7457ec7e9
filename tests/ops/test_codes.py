"""Matrices in 8 bits, restored and multiplied: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.ops import Routing, SlotLinear, fused_linear
from meswitch.ops.codes import CODE_DTYPES, Codes
from tests.support.deltas import BACKENDS, DEVICE, SPREADS, TOLERANCE, error, expected, random_delta

pytest.importorskip("triton")


def random_codes(rows, width, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        codes = torch.randint(-128, 128, (rows, width), generator=draw, dtype=torch.int8)
    else:
        codes = (torch.randn(rows, width, generator=draw) * 100).to(dtype)
    scale = torch.rand(rows, generator=draw) / (1000 if dtype == torch.int8 else 2000)
    return Codes(codes.to(DEVICE), scale.to(DEVICE))


def exact(codes):
    """[rows, in_features] float64, on the CPU."""
    return codes.codes.cpu().double() * codes.scale.cpu().double()[:, None]


def every_code(dtype):
    """[8, 256]: all bytes that are numbers, in each row."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    if dtype != torch.int8:
        codes = torch.where(codes & 0x7F == 0x7F, torch.zeros_like(codes), codes).view(dtype)
    return Codes(codes.repeat(8, 1).to(DEVICE), torch.ones(8, device=DEVICE))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("out", TOLERANCE)
@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_every_code_is_exact_in_16_bits(dtype, out, backend):
    codes = every_code(dtype)
    found = codes.into(torch.empty(codes.shape, dtype=out, device=DEVICE), backend)
    assert torch.equal(found.cpu().double(), exact(codes))


@pytest.mark.parametrize("x", TOLERANCE)
@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_every_code_is_exact_in_a_product(dtype, x):
    """Rows of the identity pick one column each: 64 of the 256 at a time."""
    codes, layer = every_code(dtype), SlotLinear.empty(8, 256, DEVICE)
    for first in range(0, 256, 64):
        picked = torch.eye(256, dtype=x, device=DEVICE)[first : first + 64]
        found = fused_linear(picked, codes, layer, Routing.build([-1] * 64, DEVICE), None, "triton")
        assert torch.equal(found.cpu().double().T, exact(codes)[:, first : first + 64])


@pytest.mark.parametrize(("rows", "width"), [(37, 100), (4, 1024), (9, 2048)])
@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_weights_are_the_codes_times_their_rows_scales_rounded_once(dtype, rows, width):
    codes = random_codes(rows, width, dtype)
    found = codes.into(torch.full((rows, width), torch.nan, dtype=torch.float16, device=DEVICE), "triton")
    assert torch.equal(found.cpu(), (codes.codes.cpu().float() * codes.scale.cpu()[:, None]).half())


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_deltas_are_added_to_scaled_sums_and_not_scaled_themselves(dtype, backend, spread):
    token_slots = SPREADS[spread]
    deltas = [random_delta(96, 512, 2, salient=4, seed=seed) for seed in range(4)]
    layer, codes = SlotLinear.build(deltas, DEVICE), random_codes(96, 512, dtype)
    x = torch.randn(len(token_slots), 512).to(DEVICE, torch.bfloat16)
    y = fused_linear(x, codes, layer, Routing.build(token_slots, DEVICE), None, backend)
    assert not layer.arrived.any()
    base = x.cpu().double() @ exact(codes).T
    assert error(y, expected(base, x, deltas, token_slots)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("x", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(37, 100), (130, 1100)])
@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_odd_sizes_with_a_bias(dtype, rows, width, x):
    deltas = [random_delta(rows, width, 3, salient=2, seed=seed) for seed in range(2)]
    layer, codes = SlotLinear.build(deltas, DEVICE), random_codes(rows, width, dtype)
    token_slots, inputs = [0, 1, -1, 0], torch.randn(4, width).to(DEVICE, x)
    bias = torch.linspace(-1, 1, rows).to(DEVICE, x)
    y = fused_linear(inputs, codes, layer, Routing.build(token_slots, DEVICE), bias, "triton")
    base = inputs.cpu().double() @ exact(codes).T + bias.cpu().double()
    assert error(y, expected(base, inputs, deltas, token_slots)) < TOLERANCE[x]


@pytest.mark.parametrize("tokens", [1, 9, 33, 64])
@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_a_layer_that_no_expert_changes_is_the_base(dtype, tokens):
    codes, layer = random_codes(130, 1100, dtype), SlotLinear.empty(130, 1100, DEVICE)
    x = torch.randn(tokens, 1100).to(DEVICE, torch.bfloat16)
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    routing = Routing(none[:0], none, torch.arange(tokens, dtype=torch.int32, device=DEVICE), 8, 1)
    y = fused_linear(x, codes, layer, routing, None, "triton")
    assert not layer.arrived.any()
    assert error(y, x.cpu().double() @ exact(codes).T) < TOLERANCE[torch.bfloat16]


def test_other_shapes_and_dtypes_are_refused_by_name():
    codes, scale = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ConfigError, match=r"codes: .*int8 or float8"):
        Codes(codes.to(torch.int16), scale)
    with pytest.raises(ConfigError, match=r"codes: .*contiguous"):
        Codes(codes.T, torch.ones(8))
    for wrong in (torch.ones(4, 1), scale.half(), torch.ones(8)[::2]):
        with pytest.raises(ConfigError, match=r"scale: .*one float32 a row of 4"):
            Codes(codes, wrong)
    held = Codes(codes, scale)
    with pytest.raises(ConfigError, match=r"out: \(4, 4\)"):
        held.into(torch.zeros(4, 4))
    with pytest.raises(ConfigError, match="'reference' writes any"):
        held.into(torch.zeros(4, 8), "triton")
    layer, x = SlotLinear.empty(4, 8, "cpu"), torch.zeros(2, 8)
    with pytest.raises(ConfigError, match=r"dtype: x is torch\.float32"):
        fused_linear(x, held, layer, Routing.build([-1, -1]), None, "triton")
    with pytest.raises(ConfigError, match=r"shapes: .*weight \(4, 8\)"):
        fused_linear(x.half(), held, SlotLinear.empty(5, 8, "cpu"), Routing.build([-1, -1]), None, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_on_a_gpu_products_agree_at_the_shapes_of_a_large_model(dtype):
    """Every number of columns, split of channels and program order that such steps have."""
    for rows, width in ((1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096)):
        deltas = [random_delta(rows, width, 2, 128, salient=8, seed=seed) for seed in range(2)]
        layer, codes = SlotLinear.build(deltas, DEVICE), random_codes(rows, width, dtype)
        restored = codes.into(torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE))
        assert torch.equal(restored, codes.into(torch.empty_like(restored), "reference"))
        for tokens in (1, 8, 9, 32, 64):
            x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
            routing = Routing.build([token % 3 - 1 for token in range(tokens)], DEVICE)
            y = fused_linear(x, codes, layer, routing)
            wanted = fused_linear(x, restored, layer, routing)
            assert not layer.arrived.any()
            assert error(y, wanted.double().cpu()) < TOLERANCE[torch.bfloat16], (rows, width, tokens)

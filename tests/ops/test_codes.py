"""Matrices in 8 bits, restored and multiplied: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.ops import Routing, SlotLinear, fused_linear
from meswitch.ops.codes import Codes
from meswitch.ops.triton.ahead import compile_ahead, fused_jobs
from tests.support.deltas import BACKENDS, DEVICE, SPREADS, TOLERANCE, error, expected, random_delta

pytest.importorskip("triton")


KINDS = ("int8", "fp8", "int4")


def random_codes(rows, width, kind, seed=0):
    draw = torch.Generator().manual_seed(seed)
    if kind == "int4":
        codes = torch.randint(-8, 8, (rows, width), generator=draw, dtype=torch.int8)
        held = Codes.paired(codes, torch.rand(rows, width // 128, generator=draw) / 50)
    else:
        codes = torch.randint(-128, 128, (rows, width), generator=draw, dtype=torch.int8)
        if kind == "fp8":
            codes = (torch.randn(rows, width, generator=draw) * 100).to(torch.float8_e4m3fn)
        held = Codes(codes, torch.rand(rows, generator=draw) / 1000)
    return Codes(held.codes.to(DEVICE), held.scale.to(DEVICE))


def exact(codes):
    """[rows, in_features] float64, on the CPU."""
    return codes.numbers().cpu().double() * codes.scales().cpu().double()


def every_code(kind):
    """[8, 256]: all codes that are numbers, in each row."""
    whole = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    if kind == "int4":
        held = Codes.paired((torch.arange(256) % 16 - 8).to(torch.int8).repeat(8, 1), torch.ones(8, 2))
        return Codes(held.codes.to(DEVICE), held.scale.to(DEVICE))
    if kind == "fp8":
        whole = torch.where(whole & 0x7F == 0x7F, torch.zeros_like(whole), whole).view(torch.float8_e4m3fn)
    return Codes(whole.repeat(8, 1).to(DEVICE), torch.ones(8, device=DEVICE))


def sized(kind, width):
    """The next width that codes of this kind have."""
    return -(-width // 128) * 128 if kind == "int4" else width


def test_pairs_hold_codes_of_4_bits_with_the_scales_of_their_groups():
    codes = torch.randint(-8, 8, (6, 384), dtype=torch.int8)
    scale = torch.rand(6, 3)
    held = Codes.paired(codes, scale)
    assert held.codes.shape == (6, 192)
    assert held.shape == (6, 384)
    assert held.nbytes == 6 * 192 + 4 * 6 * 3
    assert torch.equal(held.numbers(), codes.float())
    assert torch.equal(held.scales(), scale.repeat_interleave(128, 1))
    assert int(held.codes[2, 64 + 5]) == int(codes[2, 128 + 5]) + 8 + 16 * (int(codes[2, 128 + 64 + 5]) + 8)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("out", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_exact_in_16_bits(kind, out, backend):
    codes = every_code(kind)
    found = codes.into(torch.empty(codes.shape, dtype=out, device=DEVICE), backend)
    assert torch.equal(found.cpu().double(), exact(codes))


@pytest.mark.parametrize("x", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_exact_in_a_product(kind, x):
    """Rows of the identity pick one column each: 64 of the 256 at a time."""
    codes, layer = every_code(kind), SlotLinear.empty(8, 256, DEVICE)
    for first in range(0, 256, 64):
        picked = torch.eye(256, dtype=x, device=DEVICE)[first : first + 64]
        found = fused_linear(picked, codes, layer, Routing.build([-1] * 64, DEVICE), None, "triton")
        assert torch.equal(found.cpu().double().T, exact(codes)[:, first : first + 64])


@pytest.mark.parametrize(("rows", "width"), [(37, 100), (37, 384), (4, 1024), (9, 2048), (4, 2048)])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_codes_times_scales_rounded_once(kind, rows, width):
    codes = random_codes(rows, sized(kind, width), kind)
    found = codes.into(torch.full(codes.shape, torch.nan, dtype=torch.float16, device=DEVICE), "triton")
    assert torch.equal(found.cpu(), (codes.numbers() * codes.scales()).cpu().half())


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_deltas_are_added_to_scaled_sums_and_not_scaled_themselves(kind, backend, spread):
    token_slots = SPREADS[spread]
    deltas = [random_delta(96, 512, 2, salient=4, seed=seed) for seed in range(4)]
    layer, codes = SlotLinear.build(deltas, DEVICE), random_codes(96, 512, kind)
    x = torch.randn(len(token_slots), 512).to(DEVICE, torch.bfloat16)
    y = fused_linear(x, codes, layer, Routing.build(token_slots, DEVICE), None, backend)
    assert not layer.arrived.any()
    base = x.cpu().double() @ exact(codes).T
    assert error(y, expected(base, x, deltas, token_slots)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("x", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(37, 100), (130, 1100)])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes_with_a_bias(kind, rows, width, x):
    width = sized(kind, width)
    deltas = [random_delta(rows, width, 3, salient=2, seed=seed) for seed in range(2)]
    layer, codes = SlotLinear.build(deltas, DEVICE), random_codes(rows, width, kind)
    token_slots, inputs = [0, 1, -1, 0], torch.randn(4, width).to(DEVICE, x)
    bias = torch.linspace(-1, 1, rows).to(DEVICE, x)
    y = fused_linear(inputs, codes, layer, Routing.build(token_slots, DEVICE), bias, "triton")
    base = inputs.cpu().double() @ exact(codes).T + bias.cpu().double()
    assert error(y, expected(base, inputs, deltas, token_slots)) < TOLERANCE[x]


@pytest.mark.parametrize("tokens", [1, 9, 33, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_no_expert_changes_is_the_base(kind, tokens):
    width = sized(kind, 1100)
    codes, layer = random_codes(130, width, kind), SlotLinear.empty(130, width, DEVICE)
    x = torch.randn(tokens, width).to(DEVICE, torch.bfloat16)
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    routing = Routing(none[:0], none, torch.arange(tokens, dtype=torch.int32, device=DEVICE), 8, 1)
    y = fused_linear(x, codes, layer, routing, None, "triton")
    assert not layer.arrived.any()
    assert error(y, x.cpu().double() @ exact(codes).T) < TOLERANCE[torch.bfloat16]


def test_other_shapes_and_dtypes_are_refused_by_name():
    codes, scale = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)
    with pytest.raises(ConfigError, match=r"codes: .*int8, float8"):
        Codes(codes.to(torch.int16), scale)
    with pytest.raises(ConfigError, match=r"codes: .*contiguous"):
        Codes(codes.T, torch.ones(8))
    for wrong in (torch.ones(4, 1), scale.half(), torch.ones(8)[::2]):
        with pytest.raises(ConfigError, match=r"scale: .*\(4,\) float32 is taken"):
            Codes(codes, wrong)
    pairs = torch.zeros(4, 64, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"scale: \(4,\) .*\(1, 4\) float32 is taken"):
        Codes(pairs, scale)
    with pytest.raises(ConfigError, match=r"rows of 96 channels: .*groups of 128"):
        Codes(pairs[:, :48].contiguous(), scale)
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


LARGE = ((1024, 4096), (6144, 4096), (4096, 8704), (9216, 1024), (20608, 1024))  # a linear of each table of items
TOKENS = (1, 8, 9, 32, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_products_agree_at_the_shapes_of_large_models(kind):
    made = [made_layer(rows, width, kind) for rows, width in LARGE]
    sizes = [(tokens, steps(tokens).slots.numel(), steps(tokens).likely) for tokens in TOKENS]
    jobs = [
        job
        for layer, codes in made
        for dtype in (None, codes.codes.dtype)
        for job in fused_jobs(*codes.shape, layer.variant, torch.bfloat16, False, sizes, dtype)
    ]
    compile_ahead(jobs)
    for layer, codes in made:
        agree(layer, codes)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_every_code_is_exact(kind):
    for dtype in TOLERANCE:
        test_every_code_is_exact_in_16_bits(kind, dtype, "triton")
        test_every_code_is_exact_in_a_product(kind, dtype)


def made_layer(rows, width, kind):
    deltas = [random_delta(rows, width, 2, 128, salient=8, seed=seed) for seed in range(2)]
    return SlotLinear.build(deltas, DEVICE), random_codes(rows, width, kind)


def steps(tokens):
    """Two experts and the base, in turn."""
    return Routing.build([token % 3 - 1 for token in range(tokens)], DEVICE)


def agree(layer, codes):
    """Products with codes are those with restored weights, which are those of plain arithmetic, bit by bit."""
    restored = codes.into(torch.empty(codes.shape, dtype=torch.bfloat16, device=DEVICE))
    assert torch.equal(restored, codes.into(torch.empty_like(restored), "reference"))
    for tokens in TOKENS:
        x = torch.randn(tokens, layer.in_features, device=DEVICE, dtype=torch.bfloat16)
        y = fused_linear(x, codes, layer, steps(tokens))
        assert not layer.arrived.any()
        wanted = fused_linear(x, restored, layer, steps(tokens))
        assert error(y, wanted.double().cpu()) < TOLERANCE[torch.bfloat16], (codes.shape, tokens)

"""Property tests: packing, scales, and the whole delta."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meswitch.codec import (
    Spec,
    absmax_scales,
    dequantize,
    encode,
    mse_scales,
    pack,
    quantize,
    stored_shapes,
    unpack,
)
from meswitch.codec.quantize import expand_scale, packed_words
from meswitch.errors import MeswitchError

BITS = st.sampled_from([1, 2, 3, 4])
ROWS = st.integers(1, 9)
WIDTH = st.integers(1, 150)
GROUP = st.sampled_from([None, 8, 16, 64, 128])


def draw_delta(rows: int, width: int, seed: int, magnitude: float = 1e-3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * magnitude


@given(bits=BITS, rows=ROWS, width=WIDTH, seed=st.integers(0, 1000))
def test_unpack_undoes_pack_for_every_width_and_shape(bits, rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, width), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_words(width, bits))
    assert packed.dtype == torch.int32
    assert torch.equal(unpack(packed, bits, width), codes)


def test_packed_words_hold_the_first_code_in_the_lowest_bits():
    assert pack(torch.tensor([[1, 0, 3]]), 2).tolist() == [[0b110001]]
    assert pack(torch.tensor([[5] * 11]), 3)[0, 0].item() & 0b111111 == 0b101101


@given(
    bits=BITS,
    rows=ROWS,
    width=WIDTH,
    group=GROUP,
    seed=st.integers(0, 1000),
    magnitude=st.sampled_from([1e-9, 1e-3, 1.0, 1e6, 1e30]),
    scaler=st.sampled_from([absmax_scales, mse_scales]),
)
@settings(deadline=None)
def test_rounding_error_never_exceeds_the_bound_of_the_scale(bits, rows, width, group, seed, magnitude, scaler):
    delta = draw_delta(rows, width, seed, magnitude)
    scale = scaler(delta, bits, group)
    restored = dequantize(quantize(delta, scale, bits, group), scale, bits, group)
    step = expand_scale(scale.float(), width, group)
    bound = torch.maximum(step, delta.abs() - (2**bits - 1) * step)
    assert bool(((delta - restored).abs() <= bound * (1 + 1e-5) + 1e-37).all())


@given(bits=BITS, group=GROUP, seed=st.integers(0, 200))
@settings(deadline=None)
def test_searched_scales_are_never_worse_than_absmax(bits, group, seed):
    delta = draw_delta(4, 100, seed)
    delta[0, 3] = 0.5  # one huge outlier

    def error(scale):
        return (delta - dequantize(quantize(delta, scale, bits, group), scale, bits, group)).square().sum()

    assert error(mse_scales(delta, bits, group)) <= error(absmax_scales(delta, bits, group)) * 1.01


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_searched_scales_reach_the_known_optimum_of_a_normal_variable(bits):
    delta = torch.randn(4, 40_000, generator=torch.Generator().manual_seed(0))
    scale = mse_scales(delta, bits, None)
    error = (delta - dequantize(quantize(delta, scale, bits, None), scale, bits, None)).square().mean()
    assert error.item() == pytest.approx({1: 0.3634, 2: 0.1188, 3: 0.0374, 4: 0.0115}[bits], rel=0.02)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_zero_rows_stay_exactly_zero(bits, calibrated):
    delta = draw_delta(5, 64, 0)
    delta[2] = 0
    moment = torch.eye(64) if calibrated else None
    restored = encode(delta, Spec(bits=bits, group_size=None, salient=2), name="w", second_moment=moment).dequantize()
    assert restored[2].abs().max() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_the_tensors_name(value):
    delta = draw_delta(3, 16, 0)
    delta[1, 2] = value
    with pytest.raises(MeswitchError, match=r"model\.layers\.0\.q_proj\.weight: 1 of 48"):
        encode(delta, Spec(), name="model.layers.0.q_proj.weight")


@given(bits=BITS, rows=ROWS, width=WIDTH, group=GROUP, k=st.integers(0, 6), extra=st.integers(0, 2))
@settings(deadline=None)
def test_stored_shapes_tell_what_encode_stores(bits, rows, width, group, k, extra):
    spec = Spec(bits=bits, group_size=group, salient=k)
    extra_rows = torch.zeros(extra, width, dtype=torch.bfloat16) if extra else None
    packed = encode(draw_delta(rows, width, 1), spec, name="w", extra=extra_rows)
    stored = {suffix: (tuple(t.shape), t.dtype) for suffix, t in packed.tensors().items()}
    assert stored == stored_shapes(rows, width, spec, extra, torch.bfloat16)


def test_salient_channels_are_restored_to_16_bit_precision():
    delta = draw_delta(32, 64, 3)
    delta[:, [5, 40]] *= 50  # two channels that a shared scale ruins
    packed = encode(delta, Spec(group_size=None, salient=2), name="w")
    assert packed.salient_index.tolist() == [5, 40]
    restored = packed.dequantize()
    assert torch.allclose(restored[:, [5, 40]], delta[:, [5, 40]], rtol=2**-8, atol=1e-5)


def test_activation_energy_decides_which_channels_are_salient():
    delta = draw_delta(32, 64, 3)
    moment = torch.eye(64)
    moment[7, 7] = 1e4
    packed = encode(delta, Spec(salient=1), name="w", second_moment=moment)
    assert packed.salient_index.tolist() == [7]


def test_error_feedback_lowers_the_output_error_of_correlated_inputs():
    generator = torch.Generator().manual_seed(0)
    delta = draw_delta(48, 96, 4)
    inputs = torch.randn(2000, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
    inputs += 0.1 * torch.randn(2000, 96, generator=generator)
    moment = inputs.T @ inputs / len(inputs)

    def output_error(packed):
        return (inputs @ (packed.dequantize() - delta).T).square().mean().item()

    plain = output_error(encode(delta, Spec(salient=0), name="w"))
    fed_back = output_error(encode(delta, Spec(salient=0), name="w", second_moment=moment))
    salient = output_error(encode(delta, Spec(salient=8), name="w", second_moment=moment))
    assert fed_back < 0.5 * plain
    assert salient < fed_back


def test_refitted_scales_lower_the_output_error_further(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    delta = draw_delta(48, 96, 4)
    inputs = torch.randn(2000, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
    inputs += 0.1 * torch.randn(2000, 96, generator=generator)
    moment = inputs.T @ inputs / len(inputs)

    def output_error():
        restored = encode(delta, Spec(salient=2), name="w", second_moment=moment).dequantize()
        return (inputs @ (restored - delta).T).square().mean().item()

    refitted = output_error()

    def keep(delta, codes, bits, group_size, salient, metric, scale):
        step = expand_scale(scale.float(), delta.shape[1], group_size)
        return scale, (delta - (2 * codes.float() - (2**bits - 1)) * step)[:, salient]

    monkeypatch.setattr("meswitch.codec.delta.refit", keep)
    assert refitted < 0.9 * output_error()


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("bits", [1, 2])
def test_inputs_that_never_vary_do_no_harm(bits, rank):
    directions = torch.randn(rank, 40, generator=torch.Generator().manual_seed(1))
    moment = directions.T @ directions
    delta = draw_delta(6, 40, 2)
    packed = encode(delta, Spec(bits=bits, salient=2, group_size=16), name="w", second_moment=moment)
    restored = packed.dequantize()
    assert bool(restored.isfinite().all())
    assert (restored - delta).norm() < delta.norm()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_lengthening_gives_every_row_half_of_the_length_back_that_rounding_took(bits, calibrated):
    delta = draw_delta(24, 96, seed=3)
    moment = torch.eye(96) if calibrated else None
    short, long = (
        encode(delta, Spec(bits, 32, 2), name="w", second_moment=moment, lengthen=lengthen).dequantize()
        for lengthen in (False, True)
    )
    salient = encode(delta, Spec(bits, 32, 2), name="w", second_moment=moment).salient_index.long()
    rest = torch.ones(96, dtype=torch.bool).index_fill(0, salient, False)
    share, longer = (((q * delta)[:, rest].sum(1) / delta[:, rest].square().sum(1)) for q in (short, long))
    assert torch.allclose(longer, 2 * share / (1 + share), atol=1e-2)
    assert (longer > share).all()
    assert torch.allclose(long[:, salient], short[:, salient], rtol=2e-2, atol=2e-5)


def test_single_rows_are_restored_like_the_whole():
    packed = encode(draw_delta(20, 70, 5), Spec(bits=3, salient=3), name="w")
    rows = torch.tensor([3, 3, 19, 0])
    assert torch.equal(packed.dequantize(rows), packed.dequantize()[rows])


def test_more_bits_mean_less_error():
    delta = draw_delta(16, 256, 6)
    errors = [
        (encode(delta, Spec(bits=bits, salient=0), name="w").dequantize() - delta).square().mean().item()
        for bits in (1, 2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("options", [{"bits": 5}, {"group_size": 4}, {"salient": -1}])
def test_a_spec_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Spec(**options)

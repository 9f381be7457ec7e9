"""Methods of other papers: what they store, what they restore, and what it costs."""

import math

import pytest
import torch

from meswitch.codec import BPW, CodecRequest, PackedDelta, Spec, coded_by, encode, encode_coded, find_codec, nbytes
from meswitch.codec.delta import stored_shapes
from meswitch.compression.options import Options
from meswitch.errors import ConfigError, MeswitchError
from meswitch_lab import CODED
from meswitch_lab.deltazip import _two_of_four

FREE = [name for name in CODED if BPW in find_codec(name).parameters]
SHAPES = [(48, 96), (130, 70), (7, 41)]


def delta_of(rows, width, seed=0, scale=1e-3):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def moment_of(width, seed=1):
    """Second moment of inputs with a few strong and correlated channels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    inputs[:, ::7] *= 4
    return inputs.T @ inputs / len(inputs)


def request(rows, width, bits=2, group_size=64, seed=0, **parameters):
    spec = Spec(bits, group_size, 1)
    return CodecRequest(spec, nbytes(stored_shapes(rows, width, spec, 0, torch.float32)), seed, parameters)


def code(method, delta, moment=None, **options):
    return encode_coded(method, delta, request(*delta.shape, **options), name="a.weight", second_moment=moment)


def relative_error(delta, restored):
    return ((delta.double() - restored).norm() / delta.double().norm()).item()


def output_error(delta, restored, moment):
    difference = delta - restored
    return ((difference @ moment) * difference).sum().item()


@pytest.mark.parametrize("method", CODED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_shapes_tell_what_is_stored(method, shape, calibrated):
    coded = code(method, delta_of(*shape), moment_of(shape[1]) if calibrated else None)
    baseline = coded_by(method, coded.meta)
    expected = baseline.shapes(*shape, coded.meta)
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in coded.tensors().items()} == expected
    restored = coded.dequantize()
    assert restored.shape == shape
    assert restored.dtype == torch.float32
    assert restored.isfinite().all()


def words(count, bits):
    return 4 * math.ceil(count * bits / 32)


def documented_bytes(method, rows, width, meta, bits, group):
    """The formulas of the docstrings, written out once more."""
    if method == "bitdelta":
        return rows * words(width, 1) + 4
    if method == "svd":
        return 2 * meta["rank"] * (rows + width)
    if method == "per-axis":
        return rows * words(width, 1) + 2 * (width if meta["axis"] else rows)
    if method == "delta-come":
        return sum(
            meta[f"vectors_{b}"] * ((n if b == 8 else words(n, b)) + 2 * math.ceil(n / group))
            for b in (8, 3, 2)
            for n in (rows, width)
        )
    if method == "deltazip":
        kept = 2 * math.ceil(width / 4)
        return rows * (words(kept, bits) + words(kept, 2) + 2 * math.ceil(kept / group))
    if method == "d-qrelo":
        return rows * words(width, 1) + 4 + 2 * meta["rank"] * (rows + width)
    if method == "impart":
        kept = {b: [meta[f"{side}_{b}"] for side in ("left", "right")] for b in (8, 3, 2) if meta[f"vectors_{b}"]}
        codes = sum(n if b == 8 else words(n, b) for b, counts in kept.items() for n in counts)
        return 3 * meta["vectors"] + codes + sum(2 * math.ceil(n / group) for counts in kept.values() for n in counts)
    if method == "ultradelta":
        kept, places = meta["kept"], meta["remainder_bits"] * words(meta["kept"], 1) + words(meta["gap_bits"], 1)
        return words(kept, meta["code_bits"]) + 8 + places
    if method == "delta-dct":
        patches = math.ceil(rows / 16) * math.ceil(width / 16)
        return words(patches, 3) + 4 + sum(meta[f"patches_{b}"] * (words(256, b) + 2) for b in (4, 3, 2, 1))
    kept = meta["keep"]
    return rows * (words(width, 1) + words(kept, bits) + 2 * math.ceil(kept / group))


@pytest.mark.parametrize("method", CODED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(1, 16), (2, 64), (4, 32)])
def test_bytes_are_those_of_the_formula(method, shape, bits, group):
    coded = code(method, delta_of(*shape), bits=bits, group_size=group)
    stored = sum(tensor.nbytes for tensor in coded.tensors().values())
    assert stored == documented_bytes(method, *shape, coded.meta, bits, group)


def test_bits_a_weight_at_the_widths_of_a_large_model():
    rows, width = 4096, 4096
    bitdelta = nbytes(find_codec("bitdelta").shapes(rows, width, {}))
    assert bitdelta * 8 / (rows * width) == pytest.approx(1, abs=1e-5)
    deltazip = nbytes(find_codec("deltazip").shapes(rows, width, {"bits": 4, "group_size": 128}))
    assert deltazip * 8 / (rows * width) == (4 + 2 + 16 / 128) / 2
    dare = nbytes(find_codec("dare").shapes(rows, width, {"bits": 2, "group_size": 64, "keep": 1024, "seed": 0}))
    assert dare * 8 / (rows * width) == 1 + 0.25 * (2 + 16 / 64)


@pytest.mark.parametrize("method", ["svd", "delta-come"])
def test_methods_of_free_size_stay_within_the_default_methods_bytes(method):
    for bits in (1, 2):
        delta = delta_of(200, 120)
        budget = request(200, 120, bits=bits).budget
        stored = sum(tensor.nbytes for tensor in code(method, delta, bits=bits).tensors().values())
        smallest_step = 2 * (200 + 120) if method == "svd" else (words(200, 2) + words(120, 2) + 2 * (4 + 2))
        assert budget - smallest_step < stored <= budget


@pytest.mark.parametrize("method", FREE)
@pytest.mark.parametrize("bpw", [2.2, 1.3, 1.0, 0.5])
def test_methods_of_free_size_fill_a_budget_in_bits_a_weight(method, bpw):
    if method == "d-qrelo" and bpw < 1:
        pytest.skip("it stores a sign a weight")
    delta = delta_of(320, 512)
    options = Options(method=method, parameters={"bpw": bpw})
    coded = encode_coded(method, delta, options.request("linear", 320, 512, seed=0), name="a")
    stored = sum(tensor.nbytes for tensor in coded.tensors().values()) * 8 / delta.numel()
    assert stored <= bpw + 32 / delta.numel()
    assert stored > bpw - 16 * (320 + 512) / delta.numel()  # a rank more


@pytest.mark.parametrize("method", sorted(set(CODED) - set(FREE)))
def test_methods_of_a_fixed_size_take_no_budget(method):
    with pytest.raises(ConfigError, match=f"bpw: the method {method} has no such parameter"):
        Options(method=method, parameters={"bpw": 1.3})


def test_less_than_a_sign_a_weight_is_refused():
    with pytest.raises(ConfigError, match=r"bpw: 0\.5: the method stores a sign a weight: at least 1"):
        Options(method="d-qrelo", parameters={"bpw": 0.5})


@pytest.mark.parametrize("method", CODED)
def test_no_change_stays_no_change(method):
    for moment in (None, moment_of(40)):
        assert not code(method, torch.zeros(24, 40), moment).dequantize().any()


@pytest.mark.parametrize("method", CODED)
def test_a_delta_that_is_not_finite_is_refused_by_name(method):
    delta = delta_of(16, 32)
    delta[3, 4] = math.nan
    with pytest.raises(MeswitchError, match=r"a\.weight: 1 of 512 delta values are NaN or infinite"):
        code(method, delta)


@pytest.mark.parametrize("method", CODED)
def test_tiny_deltas_do_not_vanish(method):
    delta = delta_of(32, 64)
    wanted = relative_error(delta, code(method, delta, drop=0.5).dequantize())
    found = relative_error(delta * 1e-30, code(method, delta * 1e-30, drop=0.5).dequantize())
    assert found == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("method", [name for name in CODED if find_codec(name).uses_inputs])
def test_knowing_the_inputs_helps_their_outputs(method):
    delta, moment = delta_of(60, 80), moment_of(80)
    blind, seeing = code(method, delta), code(method, delta, moment)
    assert output_error(delta, seeing.dequantize(), moment) < 0.95 * output_error(delta, blind.dequantize(), moment)


def test_bitdelta_is_the_sign_times_the_mean_magnitude():
    delta = delta_of(20, 50)
    restored = code("bitdelta", delta).dequantize()
    assert torch.equal(restored, torch.where(delta >= 0, 1.0, -1.0) * delta.abs().mean(dtype=torch.float64).float())
    scalar = restored.abs().max()
    for other in (0.97, 1.03):  # no other scalar is closer
        assert (delta - restored).norm() < (delta - restored.sign() * scalar * other).norm()


def test_svd_of_full_rank_is_exact_up_to_the_factors_rounding():
    delta = delta_of(40, 24)
    assert relative_error(delta, code("svd", delta, rank=24).dequantize()) < 4e-3
    assert code("svd", delta, rank=100).meta == {"rank": 24}


def test_svd_keeps_a_low_rank_delta_whole_and_is_the_best_of_its_rank():
    low = delta_of(40, 3) @ delta_of(3, 60, seed=1)
    assert relative_error(low, code("svd", low, rank=3).dequantize()) < 5e-3
    delta = delta_of(40, 60)
    dropped = torch.linalg.svdvals(delta)[5:].square().sum().sqrt() / delta.norm()
    assert relative_error(delta, code("svd", delta, rank=5).dequantize()) == pytest.approx(dropped.item(), rel=1e-3)


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_per_axis_finds_the_axis_along_which_magnitudes_differ(axis):
    signs = delta_of(30, 40).sign()
    size = torch.linspace(1, 5, (30, 40)[axis]) * 1e-3
    delta = signs * (size[:, None] if axis == 0 else size)
    for moment in (None, moment_of(40)):
        coded = code("per-axis", delta, moment)
        assert coded.meta == {"axis": axis}
        assert relative_error(delta, coded.dequantize()) < 4e-3  # the scales are bfloat16


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_per_axis_is_never_worse_than_bitdelta(calibrated):
    delta, moment = delta_of(50, 60), moment_of(60) if calibrated else torch.eye(60)
    coded = code("per-axis", delta, moment if calibrated else None)
    bound = output_error(delta, code("bitdelta", delta).dequantize(), moment)
    assert output_error(delta, coded.dequantize(), moment) < bound


def test_delta_come_gives_larger_singular_vectors_more_bits():
    left, right = torch.linalg.qr(delta_of(256, 64))[0], torch.linalg.qr(delta_of(128, 64, seed=1))[0]
    values = 0.5 ** torch.arange(64)
    delta = left * values @ right.T
    coded = code("delta-come", delta)
    assert coded.meta["vectors_8"] == coded.meta["vectors_3"] == 1
    assert coded.meta["vectors_2"] > 20
    # the first vector is nearly exact, so what is missing is far less than with two bits for it
    top = left[:, :1] * values[:1] @ right[:, :1].T
    assert relative_error(top, coded.dequantize() - (delta - top)) < 0.2
    packed = encode(delta, Spec(2, 64, 0), name="a")
    assert relative_error(delta, coded.dequantize()) < relative_error(delta, packed.dequantize())


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_deltazip_keeps_two_of_every_four(calibrated):
    delta = delta_of(33, 80)
    restored = code("deltazip", delta, moment_of(80) if calibrated else None, bits=4).dequantize()
    assert ((restored.view(33, 20, 4) != 0).sum(-1) == 2).all()


def test_deltazip_without_inputs_keeps_the_largest():
    delta = delta_of(20, 64)
    restored = code("deltazip", delta, bits=4).dequantize().view(20, 16, 4)
    kept = torch.zeros(20, 16, 4, dtype=torch.bool).scatter_(2, _two_of_four(delta.view(20, 16, 4)), True)
    assert torch.equal(restored != 0, kept)


def test_dare_drops_the_share_it_says_and_rescales_the_rest():
    delta = torch.full((64, 200), 2e-3)
    restored = code("dare", delta, drop=0.75).dequantize()
    assert ((restored != 0).sum(1) == 50).all()
    assert torch.allclose(restored[restored != 0], torch.tensor(4 * 2e-3), rtol=4e-3)


def test_dare_is_unbiased_and_repeatable():
    delta = delta_of(40, 100)
    restored = [code("dare", delta, bits=4, drop=0.5, seed=seed).dequantize() for seed in range(200)]
    assert torch.equal(restored[3], code("dare", delta, bits=4, drop=0.5, seed=3).dequantize())
    assert not torch.equal(restored[3], restored[4])
    assert relative_error(delta, torch.stack(restored).mean(0)) < 0.15


def test_extra_rows_are_kept_as_they_are():
    extra = torch.ones(2, 32, dtype=torch.bfloat16)
    coded = encode_coded("bitdelta", delta_of(8, 32), request(8, 32), name="a", extra=extra)
    assert coded.tensors()["weight_extra"] is extra
    assert coded.dequantize().shape == (8, 32)
    assert not isinstance(coded, PackedDelta)


@pytest.mark.parametrize(
    ("method", "meta", "message"),
    [
        ("gzip", {}, "method: 'gzip' is none of me-switch.*install the package that brings it"),
        (None, None, "method: None is none of"),
        ("svd", None, "meta.rank: missing field"),
        ("svd", {"rank": 2, "depth": 1}, "meta.depth: unknown field"),
    ],
)
def test_what_is_not_known_is_an_error(method, meta, message):
    with pytest.raises(ValueError, match=message):
        coded_by(method, meta)


@pytest.mark.parametrize(
    ("method", "meta", "message"),
    [
        ("svd", {"rank": 0}, "rank"),
        ("svd", {"rank": 9}, "rank"),
        ("per-axis", {"axis": 2}, "axis"),
        ("deltazip", {"bits": 8, "group_size": 64}, "bits"),
        ("deltazip", {"bits": 2, "group_size": 9}, "group_size: 9 is odd"),
        ("deltazip", {"bits": 2, "group_size": 4}, "group_size"),
        ("dare", {"bits": 2, "group_size": 0, "keep": 17, "seed": 0}, "keep"),
        ("d-qrelo", {"rank": 9}, "rank"),
        ("ultradelta", {"kept": 129, "gap_bits": 129, "remainder_bits": 0, "code_bits": 4}, "kept"),
        ("ultradelta", {"kept": 12, "gap_bits": 11, "remainder_bits": 0, "code_bits": 4}, "gap_bits"),
        ("ultradelta", {"kept": 12, "gap_bits": 12, "remainder_bits": 0, "code_bits": 8}, "code_bits"),
        ("delta-dct", {"patch": 1, "patches_4": 0, "patches_3": 0, "patches_2": 0, "patches_1": 0}, "patch"),
        ("delta-dct", {"patch": 8, "patches_4": 1, "patches_3": 1, "patches_2": 1, "patches_1": 0}, "patches"),
        ("delta-come", {"vectors_8": 9, "vectors_3": 0, "vectors_2": 0, "group_size": 0}, "vectors"),
        ("delta-come", {"vectors_8": 2, "vectors_3": -1, "vectors_2": 0, "group_size": 0}, "vectors"),
    ],
)
def test_numbers_that_make_no_sense_are_an_error(method, meta, message):
    with pytest.raises(ValueError, match=message):
        find_codec(method).shapes(8, 16, meta)

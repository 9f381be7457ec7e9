"""Delta-DCT: patches in the domain of the cosine transform, more bits for strong patches."""

import pytest
import torch

from meswitch.codec import CodecRequest, Spec, encode_coded
from meswitch.codec.quantize import unpack
from meswitch_lab.delta_dct import _basis, _bits, _cut, _steps


def delta_of(rows, width):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * 1e-3


def coded(delta, bpw, **parameters):
    return encode_coded("delta-dct", delta, CodecRequest(Spec(), int(bpw * delta.numel() / 8), 0, parameters), name="a")


def test_the_transform_is_the_orthonormal_dct():
    basis = _basis(8, torch.device("cpu"))
    assert torch.allclose(basis @ basis.T, torch.eye(8), atol=1e-6)
    assert torch.allclose(basis[0], torch.full((8,), 8**-0.5))
    wave = torch.cos(torch.pi / 8 * (torch.arange(8) + 0.5) * 3)
    assert (basis @ wave).abs().argmax() == 3


def test_at_one_bit_the_stronger_half_has_two_and_the_rest_none():
    delta = delta_of(64, 64)
    delta[:32] *= 3
    made = coded(delta, 1.1)
    bits = unpack(made.tensors()["patch_packed"], 3, 16)[0]
    assert bits.tolist() == [2] * 8 + [0] * 8
    assert not made.dequantize()[32:].any()


@pytest.mark.parametrize(("count", "wanted"), [(4, [3, 3, 1, 1]), (8, [3] * 4 + [1] * 4)])
def test_at_two_bits_the_halves_have_three_and_one(count, wanted):
    steps = _steps(count)
    spent = 0
    for taken in range(len(steps) + 1):
        spent = sum(_bits(steps[:taken], count))
        if spent == 2 * count:
            assert _bits(steps[:taken], count) == wanted
            break
    assert spent == 2 * count


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_step_spends_more_and_the_last_gives_all_four_bits(count):
    steps = _steps(count)
    spent = [sum(_bits(steps[:taken], count)) for taken in range(len(steps) + 1)]
    assert spent == sorted(set(spent))
    assert _bits(steps, count) == [4] * count


def test_patches_cover_the_matrix():
    delta = delta_of(37, 50)
    assert _cut(delta, 16).shape == (3 * 4, 16, 16)
    assert coded(delta, 40.0).dequantize().shape == (37, 50)
    assert (coded(delta, 40.0).dequantize() - delta).norm() < 0.12 * delta.norm()


def test_rescaling_keeps_the_mean_magnitude():
    delta = delta_of(64, 64)
    plain, rescaled = coded(delta, 1.0).dequantize(), coded(delta, 1.0, rescale=1).dequantize()
    assert rescaled.abs().mean() == pytest.approx(delta.abs().mean().item(), rel=1e-4)
    assert plain.abs().mean() < 0.8 * delta.abs().mean()


def test_the_size_of_patches_is_a_parameter():
    assert coded(delta_of(64, 64), 1.3, patch=8).meta["patch"] == 8

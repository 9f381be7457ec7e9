"""D-QReLO: signs, then a low rank of what they miss."""

import pytest
import torch

from meswitch.codec import CodecRequest, Spec, encode_coded


def coded(delta, budget, method="d-qrelo"):
    return encode_coded(method, delta, CodecRequest(Spec(), budget), name="a")


def delta_of(rows, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator) * 1e-3


def signs(delta):
    return delta.numel() // 8 + 4


def test_without_room_for_a_rank_it_is_bitdelta():
    delta = delta_of(64, 96)
    made = coded(delta, signs(delta) + 2 * (64 + 96) - 1)
    assert made.meta == {"rank": 0}
    assert torch.equal(made.dequantize(), coded(delta, 0, "bitdelta").dequantize())


def test_the_rank_is_what_fits_and_the_best_of_the_residual():
    delta = delta_of(64, 96)
    made = coded(delta, signs(delta) + 2 * (64 + 96) * 5)
    assert made.meta == {"rank": 5}
    residual = delta - coded(delta, 0, "bitdelta").dequantize()
    missed = torch.linalg.svdvals(residual)[5:].square().sum().sqrt()
    assert (delta - made.dequantize()).norm().item() == pytest.approx(missed.item(), rel=1e-3)


def test_of_full_rank_it_is_exact_up_to_the_factors_rounding():
    delta = delta_of(24, 40)
    assert (delta - coded(delta, 1 << 20).dequantize()).norm() < 4e-3 * delta.norm()

"""cpu: products in bfloat16, where they are worth it, are near those in float32."""

import pytest
import torch

from meswitch import cpu


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shape", [(8, 16, 8), (512, 1024, 512)])
def test_a_rough_product_is_near_the_product(monkeypatch, native, shape):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: native)
    rows, width, columns = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, width, generator=generator)
    right = torch.randn(width, columns, generator=generator)
    found, wanted = cpu.rough_product(left, right), left @ right
    assert found.dtype == torch.float32
    error = float((found - wanted).norm() / wanted.norm())
    if native and rows == 512:
        assert 0 < error < 1 / 250
    else:
        assert error == 0
    assert cpu.rough_product(left.bfloat16(), right.bfloat16()).dtype == torch.float32


def test_codes_from_rough_products_are_as_good(monkeypatch):
    from meswitch.codec import Spec, encode

    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(512, 1024, generator=generator) * 0.01
    inputs = torch.randn(2048, 64, generator=generator) @ torch.randn(64, 1024, generator=generator)
    inputs += torch.randn(2048, 1024, generator=generator)
    moment = inputs.T @ inputs / len(inputs)

    def loss():
        found = encode(delta, Spec(bits=2, group_size=128, salient=2), name="w", second_moment=moment)
        error = delta - found.dequantize()
        return float(((error @ moment) * error).sum() / ((delta @ moment) * delta).sum())

    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    exact = loss()
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    assert loss() == pytest.approx(exact, rel=0.02)

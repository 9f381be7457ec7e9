"""ImPart: singular vectors that are sparse, the less the larger their singular value."""

import pytest
import torch

from meswitch.codec import CodecRequest, Spec, encode_coded
from meswitch_lab.impart import _sparsified


def delta_of(rows, width, decay=0.9):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(width, rows, generator=generator))[0]
    return left * decay ** torch.arange(rows) @ right.T * 1e-2


def coded(delta, bpw, moment=None, seed=0, **parameters):
    request = CodecRequest(Spec(2, 32), int(bpw * delta.numel() / 8), seed, parameters)
    return encode_coded("impart", delta, request, name="a", second_moment=moment)


def densities(made):
    return made.tensors()["density_packed"][0].float() / 255


def test_a_larger_singular_value_keeps_more():
    kept = densities(coded(delta_of(64, 96), 1.0, preprune=0.2))
    assert kept[0] == 1
    assert (kept.diff() <= 0).all()
    assert kept[-1] < 0.8


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
def test_the_mean_sparsity_is_the_one_that_is_asked_for(gamma):
    values = torch.linspace(1, 0.1, 200)
    found = _sparsified(values, gamma).float() / 255
    sparsity = 1 - found.sum() / len(values)
    assert sparsity == pytest.approx(gamma, abs=2 / 200)
    # what is left follows the formula
    assert torch.allclose(1 - found, ((1 - values) * gamma)[: len(found)], atol=1 / 255)


def test_it_is_right_on_average():
    delta = delta_of(48, 64)
    restored = torch.stack([coded(delta, 1.5, seed=seed, preprune=0.0).dequantize() for seed in range(200)])
    one, mean = (restored[0] - delta).norm(), (restored.mean(0) - delta).norm()
    assert mean < 0.4 * one


def test_the_seed_draws_the_entries():
    delta = delta_of(48, 64)
    first, again, other = (coded(delta, 1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.dequantize(), again.dequantize())
    assert not torch.equal(first.dequantize(), other.dequantize())
    assert (first.meta["seed"], other.meta["seed"]) == (1, 2)


def test_preprune_drops_vectors_before_all():
    delta = delta_of(48, 64)
    assert coded(delta, 4.0, preprune=0.75).meta["vectors"] <= 12
    assert (densities(coded(delta, 40.0, preprune=0.75)) == 1).all()


def test_a_budget_for_everything_keeps_everything():
    made = coded(delta_of(48, 64), 40.0)
    assert made.meta["vectors"] == 48
    assert (densities(made) == 1).all()


def test_feedback_changes_only_codes():
    delta = delta_of(48, 64)
    inputs = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    inputs[:, ::5] *= 5
    blind, seeing = coded(delta, 1.0), coded(delta, 1.0, moment=inputs.T @ inputs / 300)
    assert blind.meta == seeing.meta
    changed = {name for name, part in blind.tensors().items() if not torch.equal(part, seeing.tensors()[name])}
    assert changed <= {"right8_packed", "right3_packed", "right2_packed"}
    assert changed

"""Error feedback: the factors of the second moment, and rounding against the definition."""

import pytest
import torch

from meswitch.codec import mse_scales
from meswitch.codec.feedback import damped, feedback_codes, inverse_factor, upper_factor
from meswitch.codec.quantize import expand_scale


def draw_moment(width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * width, width, generator=generator) * torch.rand(width, generator=generator)
    inputs += torch.randn(4 * width, 1, generator=generator)
    return damped(inputs.T @ inputs / len(inputs), 0.01)


@pytest.mark.parametrize("width", [1, 7, 300])
def test_the_factors_are_triangular_and_make_the_moment_and_its_inverse(width):
    metric = draw_moment(width)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    moved = metric[order][:, order].double()
    upper, inverse = upper_factor(metric, order).double(), inverse_factor(metric, order).double()
    for factor in (upper, inverse):
        assert torch.equal(factor, factor.triu())
        assert (factor.diagonal() > 0).all()
    assert torch.allclose(upper @ upper.T, moved, atol=1e-5 * moved.abs().max())
    assert torch.allclose(inverse.T @ inverse @ moved, torch.eye(width, dtype=torch.float64), atol=2e-3)


def test_a_moment_that_has_no_factor_leaves_columns_alone():
    moment = torch.full((4, 4), float("nan"))
    assert torch.equal(upper_factor(moment, torch.arange(4)), torch.eye(4))


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize(("rows", "width", "exact"), [(3, 5, 1), (20, 150, 0), (9, 290, 4)])
def test_columns_are_rounded_as_gptq_rounds_them(bits, rows, width, exact):
    """Column by column with the factor of the inverse, in float64, as in the paper's algorithm."""
    generator = torch.Generator().manual_seed(bits)
    delta = torch.randn(rows, width, generator=generator)
    scale = mse_scales(delta, bits, 16)
    metric, top = draw_moment(width), 2**bits - 1
    order = torch.randperm(width, generator=generator)
    found = feedback_codes(delta, scale, bits, 16, upper_factor(metric, order), order, exact)
    factor = torch.linalg.cholesky(torch.linalg.inv(metric[order][:, order].double()), upper=True)
    target = delta.double()[:, order]
    step = expand_scale(scale.double(), width, 16)[:, order]
    wanted = torch.empty(rows, width, dtype=torch.uint8)
    for column in range(width):
        codes = ((target[:, column] / step[:, column] + top) / 2).round().clamp(0, top)
        wanted[:, order[column]] = codes.to(torch.uint8)
        if column < width - exact:
            error = (target[:, column] - (2 * codes - top) * step[:, column]) / factor[column, column]
            target[:, column + 1 :] -= torch.outer(error, factor[column, column + 1 :])
    assert (found == wanted).float().mean() > 0.99  # float32 tips a few that lie between two codes, and what follows


def test_groups_without_a_change_stay_exact():
    delta = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    delta[:, 16:] = 0
    scale = mse_scales(delta, 2, 16)
    codes = feedback_codes(delta, scale, 2, 16, upper_factor(draw_moment(32), torch.arange(32)), torch.arange(32), 0)
    assert ((2 * codes.float() - 3) * expand_scale(scale.float(), 32, 16))[:, 16:].abs().max() == 0

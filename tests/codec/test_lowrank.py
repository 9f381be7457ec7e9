"""A low-rank pair is exact, and rows without a change take no bytes."""

import pytest
import torch

from meswitch.codec import LowRankDelta, Rank, encode_pair, nbytes, pair_shapes, spectrum
from meswitch.ops import BACKENDS


def delta(rows=48, in_features=32, rank=4, scale=0.5, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    left = torch.randn(rows, rank, generator=draw).to(dtype)
    return LowRankDelta(left, torch.randn(rank, in_features, generator=draw).to(dtype), scale)


def test_the_delta_is_the_product_times_its_factor():
    pair = delta()
    assert (pair.rows, pair.rank, pair.in_features) == (48, 4, 32)
    assert torch.equal(pair.dequantize(), pair.left @ pair.right * 0.5)
    assert torch.equal(pair.dequantize(torch.tensor([5, 2])), (pair.left[[5, 2]] @ pair.right) * 0.5)


def test_rows_without_a_change_are_not_stored():
    pair = delta()
    pair.left[10:] = 0
    named = pair.tensors()
    assert named["row_index"].tolist() == list(range(10))
    assert torch.equal(named["weight_left"], pair.left[:10])
    assert "row_index" not in delta().tensors()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_multiplies_without_restoring_the_matrix(backend, dtype):
    pair = delta(dtype=dtype)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ (pair.left.double() @ pair.right.double() * 0.5).T
    assert torch.allclose(BACKENDS[backend].expert_matmul(x, pair).double(), wanted, atol=1e-5)
    ids = torch.tensor([3, 3, 47])
    assert torch.allclose(BACKENDS[backend].expert_rows(ids, pair), pair.dequantize()[ids], atol=1e-6)


def test_the_pair_loses_no_more_than_the_singular_values_beyond_its_rank():
    matrix = torch.randn(40, 24, generator=torch.Generator().manual_seed(2))
    matrix[7] = 0
    pair = encode_pair(matrix, Rank(6), name="w")
    lost = (pair.dequantize() - matrix).square().sum()
    assert lost == pytest.approx(float(torch.linalg.svdvals(matrix)[6:].square().sum()), rel=1e-2)
    assert (pair.dequantize()[7] == 0).all()
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in pair.tensors().items()} == pair_shapes(40, 24, 6)
    assert nbytes(pair_shapes(40, 24, 6)) == (40 + 24) * 6 * 2


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_the_spectrum_is_that_of_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(spectrum(matrix), torch.linalg.svdvals(matrix).square(), rtol=1e-4, atol=1e-4)


def test_rows_that_hardly_moved_are_left_out_of_a_pair():
    matrix = torch.randn(40, 24, generator=torch.Generator().manual_seed(2))
    matrix[10:] *= 1e-3
    pair = encode_pair(matrix, Rank(3, row_floor=0.1), name="w")
    assert pair.tensors()["row_index"].tolist() == list(range(10))
    assert (pair.dequantize()[10:] == 0).all()

"""Shares of a delta put together are the delta; q, k and v as one matrix are q, k and v. No vLLM needed."""

import pytest
import torch

from meswitch.errors import ConfigError, IncompatibleError
from meswitch.ops.layout import Shape, padded_salient
from meswitch.vllm.arena import joint_group, joint_shape
from meswitch.vllm.prepare import conform, join, take_columns, take_rows
from tests.support.deltas import random_delta


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("ranks", [2, 4])
def test_column_parallel_shares_are_rows(bits, group, ranks):
    delta = random_delta(64, 128, bits, group, salient=5)
    shares = [take_rows(delta, r * 64 // ranks, (r + 1) * 64 // ranks) for r in range(ranks)]
    assert torch.equal(torch.cat([share.dequantize() for share in shares]), delta.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("width", "group", "ranks"), [(256, 32, 2), (256, 64, 4), (256, None, 2), (192, 64, 2), (192, 128, 4)]
)
def test_row_parallel_shares_are_columns(bits, width, group, ranks):
    delta = random_delta(24, width, bits, group, salient=7)
    cuts = [(r * width // ranks, (r + 1) * width // ranks) for r in range(ranks)]
    shares = [take_columns(delta, first, last, "layer") for first, last in cuts]
    assert torch.equal(torch.cat([share.dequantize() for share in shares], dim=1), delta.dequantize())
    assert sum(share.salient_index.numel() for share in shares) == 7
    x = torch.randn(3, width)
    partial = sum(x[:, first:last] @ share.dequantize().T for (first, last), share in zip(cuts, shares, strict=True))
    assert torch.allclose(partial, x @ delta.dequantize().T, atol=1e-5)  # what the all-reduce adds up


def test_a_cut_within_a_small_group_is_refused_by_name():
    delta = random_delta(8, 96, 2, 32)
    with pytest.raises(IncompatibleError, match=r"model\.down_proj: its 96 input channels are cut at 24 and 48"):
        take_columns(delta, 24, 48, "model.down_proj")


def test_parts_of_different_bits_groups_and_salient_channels_are_one_matrix():
    parts = [random_delta(16, 128, 2, 64, salient=3, seed=1), None, random_delta(8, 128, 3, 32, salient=2, seed=2)]
    parts.append(random_delta(8, 128, 1, None, seed=3))
    whole = join(parts, [16, 8, 8, 8])
    wanted = [torch.zeros(8, 128) if part is None else part.dequantize() for part in parts]
    assert (whole.bits, whole.group_size) == (3, 32)
    assert torch.equal(whole.dequantize(), torch.cat(wanted))
    assert join([None, None], [4, 4]) is None


def test_more_bits_and_finer_groups_change_nothing():
    delta = random_delta(8, 128, 1, 64, salient=2)
    assert torch.equal(conform(delta, 4, 16).dequantize(), delta.dequantize())
    with pytest.raises(ConfigError, match="bits: 1, in a place made for 0"):
        conform(delta, 0, 64)
    with pytest.raises(ConfigError, match="group_size: 64, in a place made for 128"):
        conform(delta, 2, 128)


def test_a_place_holds_the_largest_of_each():
    shapes = [Shape(8, 128, 2, 64, padded_salient(3)), Shape(8, 128, 4, 32, 0), Shape(8, 128, 1, 0, padded_salient(20))]
    assert joint_shape(shapes) == Shape(8, 128, 4, 32, 32)
    assert joint_group([64, None, 96], 256) == 32
    with pytest.raises(ConfigError, match="no common divisor"):
        joint_group([64, 24], 256)

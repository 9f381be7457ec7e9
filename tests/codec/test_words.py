"""Blocks of signs as words of a first-order Reed-Muller code: less than a bit a weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meswitch.codec import Spec, encode, stored_shapes, unfold
from meswitch.codec.words import LENGTHS, fold, hadamard, nearest_words, signs_of, word_bits, words_shape

LENGTH = st.sampled_from(LENGTHS)


def draw_delta(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 1e-3


@pytest.mark.parametrize("length", LENGTHS)
def test_two_words_differ_in_half_of_their_signs_or_in_all(length):
    words = signs_of(torch.arange(2 * length)[:, None], length)
    differing = (words[:, None] != words[None]).sum(-1)
    assert set(differing.flatten().tolist()) == {0, length // 2, length}
    assert torch.equal(hadamard(length) @ hadamard(length), length * torch.eye(length))


@given(length=LENGTH, rows=st.integers(1, 5), blocks=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_the_word_found_is_the_nearest_of_all(length, rows, blocks, seed):
    values = draw_delta(rows, blocks * length, seed)
    words = signs_of(torch.arange(2 * length)[:, None], length)
    distances = (values.view(rows, blocks, 1, length) - 1e-3 * words).square().sum(-1)
    assert torch.equal(nearest_words(values, length), distances.argmin(-1))


@given(length=LENGTH, rows=st.integers(1, 5), blocks=st.integers(1, 20), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_folding_is_undone_and_takes_the_bits_of_a_word(length, rows, blocks, seed):
    width = blocks * length
    delta = encode(draw_delta(rows, width, seed), Spec(1, None, 0, block=length), name="w")
    folded = fold(delta.packed, width, length)
    assert tuple(folded.shape) == words_shape(rows, width, length)
    assert folded.shape[1] * 32 < blocks * word_bits(length) + 32
    assert torch.equal(unfold(folded, width, length), delta.packed)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("length", LENGTHS)
def test_stored_shapes_tell_what_encode_stores(length, group, calibrated):
    spec = Spec(1, group, 0, block=length)
    moment = torch.eye(96) if calibrated else None
    named = encode(draw_delta(6, 96, 1), spec, name="w", second_moment=moment).tensors()
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in named.items()} == stored_shapes(
        6, 96, spec, 0, torch.float32
    )


def test_shorter_words_keep_more_and_a_sign_for_each_weight_most():
    delta = draw_delta(64, 256, 2)
    specs = [Spec(1, None, 0, block=8), Spec(1, None, 0, block=4), Spec(1, None, 0)]
    lost = [
        (encode(delta, spec, name="w").dequantize() - delta).square().sum() / delta.square().sum() for spec in specs
    ]
    assert lost == sorted(lost, reverse=True)
    assert lost[0] == pytest.approx(0.59, abs=0.02)


@pytest.mark.parametrize("length", LENGTHS)
def test_feedback_lowers_the_error_of_the_output(length):
    draw = torch.Generator().manual_seed(4)
    mix = torch.randn(96, 96, generator=draw)
    moment = mix @ torch.diag(torch.linspace(0.01, 3, 96) ** 2) @ mix.T / 96
    delta = draw_delta(64, 96, 5)

    def lost(**solver: bool) -> float:
        spec = Spec(1, None, 0, block=length, **solver)
        error = encode(delta, spec, name="w", second_moment=moment).dequantize() - delta
        return float(((error @ moment) * error).sum() / ((delta @ moment) * delta).sum())

    plain = lost(feedback=False, refit=False)
    assert lost(refit=False) < 0.85 * plain
    assert lost() < lost(refit=False)


@pytest.mark.parametrize("options", [{"block": 5}, {"block": 8, "bits": 2}, {"block": 8, "salient": 1}])
def test_words_are_for_one_bit_without_salient_channels(options):
    with pytest.raises(ValueError, match="block"):
        Spec(**{"bits": 1, "salient": 0} | options)

"""Exact deltas: every pattern of bits comes back, and nothing else ever does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meswitch.codec import exact
from meswitch.codec.exact import EXACT_DTYPES, ExactDelta, encode_exact, same_bits
from meswitch.errors import ArtifactError

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
SPECIAL = {
    torch.bfloat16: [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x0001, 0x8001, 0x007F, 0x7F7F, 0xFF7F],
    torch.float16: [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF, 0x0001, 0x8001, 0x03FF, 0x7BFF, 0xFBFF],
    torch.float32: [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 1, 0x80000001, 0x7F7FFFFF],
}
dtypes = st.sampled_from(EXACT_DTYPES)


def any_bits(shape, dtype, draw):
    """Each pattern as likely as another."""
    bits = 8 * dtype.itemsize
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=draw)
    return values.to(INTEGERS[dtype]).view(dtype)


def special(dtype):
    bits = 8 * dtype.itemsize
    values = [value - (value >> (bits - 1) << bits) for value in SPECIAL[dtype]]
    return torch.tensor(values, dtype=INTEGERS[dtype]).view(dtype)


def round_trip(ours, base):
    delta = encode_exact(ours, base)
    parts = {suffix: tensor.clone() for suffix, tensor in delta.tensors().items()}
    stored = ExactDelta(parts["weight_exact"], parts["weight_blocks"], tuple(ours.shape), ours.dtype)
    return stored.restore(base, "a.weight")


@given(
    dtype=dtypes, rows=st.integers(0, 9), width=st.integers(1, 70), extra=st.integers(-3, 3), seed=st.integers(0, 99)
)
@settings(deadline=None)
def test_all_bits_come_back_whatever_they_are(dtype, rows, width, extra, seed):
    draw = torch.Generator().manual_seed(seed)
    ours, base = any_bits((rows, width), dtype, draw), any_bits((max(0, rows - extra), width), dtype, draw)
    assert same_bits(round_trip(ours, base), ours)


@given(dtype=dtypes, other=dtypes, share=st.sampled_from([0.0, 0.01, 0.3, 1.0]), seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_fine_tune_comes_back_from_a_base_of_any_dtype(dtype, other, share, seed):
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(50, 40, generator=draw) * 0.02
    moved = (torch.rand(50, 40, generator=draw) < share) * torch.randn(50, 40, generator=draw) * 2e-4
    ours = (base + moved).to(dtype)
    assert same_bits(round_trip(ours, base.to(other)), ours)


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_special_values_come_back_from_each_other(dtype):
    values = special(dtype)
    ours, base = values.repeat(len(values)), values.repeat_interleave(len(values))
    back = round_trip(ours, base)
    assert torch.equal(back.view(INTEGERS[dtype]), ours.view(INTEGERS[dtype]))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5, 7)])
def test_tensors_of_every_dimension(shape):
    draw = torch.Generator().manual_seed(0)
    ours, base = any_bits(shape, torch.bfloat16, draw), any_bits(shape, torch.bfloat16, draw)
    assert same_bits(round_trip(ours, base), ours)


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_are_coded_by_threads_and_the_last_one_may_be_short(monkeypatch, threads):
    monkeypatch.setattr(exact, "BLOCK", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    draw = torch.Generator().manual_seed(0)
    ours, base = any_bits((3, 1111), torch.bfloat16, draw), any_bits((3, 1111), torch.bfloat16, draw)
    assert encode_exact(ours, base).blocks.shape == (4, 3)
    assert same_bits(round_trip(ours, base), ours)


def test_the_same_bits_are_told_from_the_same_numbers():
    zeros = torch.zeros(3, dtype=torch.bfloat16)
    assert not same_bits(zeros, -zeros)
    nan = torch.full((3,), float("nan"))
    assert same_bits(nan, nan.clone())
    assert not same_bits(zeros, zeros.float())
    assert not same_bits(zeros, zeros[:2])


@pytest.mark.parametrize(
    ("share", "most"), [(1.0, 0.35), (0.3, 0.12), (0.1, 0.065), (0.01, 0.012)], ids=lambda value: str(value)
)
def test_bytes_follow_the_share_of_changed_weights(share, most):
    draw = torch.Generator().manual_seed(0)
    full = torch.randn(1 << 20, generator=draw) * 0.02
    base = full.bfloat16()
    moved = (full + 2e-4 * torch.randn(1 << 20, generator=draw)).bfloat16()
    if share < 1:  # single steps of the grid, as reinforcement learning makes them
        step = (torch.rand(1 << 20, generator=draw) < share) * (2 * torch.randint(0, 2, (1 << 20,), generator=draw) - 1)
        moved = (base.view(torch.int16) + step.short()).view(torch.bfloat16)
    delta = encode_exact(moved, base)
    assert delta.nbytes < most * moved.nbytes
    assert same_bits(delta.restore(base, "a.weight"), moved)


def damaged(change):
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(40, 50, generator=draw).bfloat16()
    delta = encode_exact((base.float() * 1.01).bfloat16(), base)
    stream, blocks = change(delta.stream.clone(), delta.blocks.clone())
    return ExactDelta(stream, blocks, delta.shape, delta.dtype), base


def flipped(stream, blocks):
    stream[len(stream) // 2] ^= 4
    return stream, blocks


def other_sizes(stream, blocks):
    blocks[0, :2] = torch.tensor([len(stream) - 3, 3])
    return stream, blocks


def negative(stream, blocks):
    blocks[0, :2] = torch.tensor([len(stream) + 3, -3])
    return stream, blocks


DAMAGE = {
    "a flipped bit": flipped,
    "sizes that do not fit": other_sizes,
    "a negative size": negative,
    "cut off": lambda stream, blocks: (stream[:-1], blocks),
    "nothing": lambda stream, blocks: (stream[:0], blocks * 0),
    "no blocks": lambda stream, blocks: (stream[:0], blocks[:0]),
    "another sum": lambda stream, blocks: (stream, blocks + torch.tensor([0, 0, 1])),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_stream_is_refused_by_the_tensors_name(change):
    delta, base = damaged(change)
    with pytest.raises(ArtifactError, match=r"^a\.weight: "):
        delta.restore(base, "a.weight")


@given(place=st.floats(0, 0.999), mask=st.integers(1, 255))
@settings(deadline=None)
def test_no_changed_byte_is_ever_a_silent_wrong_value(place, mask):
    def change(stream, blocks):
        stream[int(place * len(stream))] ^= mask
        return stream, blocks

    delta, base = damaged(change)
    try:
        back = delta.restore(base, "a.weight")
    except ArtifactError:
        return
    assert same_bits(back, (base.float() * 1.01).bfloat16())  # bits after the end of a plane mean nothing


def test_a_tensor_of_another_base_is_refused():
    delta, base = damaged(lambda stream, blocks: (stream, blocks))
    base[0, 0] += 1
    with pytest.raises(ArtifactError, match=r"a\.weight: block 0 is not restored to what was compressed"):
        delta.restore(base, "a.weight")
    with pytest.raises(ArtifactError, match=r"a\.weight: the base's shape \[40, 49\] does not go with \[40, 50\]"):
        delta.restore(base[:, :49], "a.weight")

"""Which entries are kept: drawn from a seed, or stored."""

import pytest
import torch

from meswitch_lab.sparse import decode_positions, drawn, encode_positions, hashed, position_shapes, rice_bits

CPU = torch.device("cpu")


def test_the_hash_is_splitmix64():
    state = (5 + 1) * 0x9E3779B97F4A7C15 % 2**64
    expected = []
    for counter in range(4):
        x = (state + counter * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append(x ^ (x >> 31))
    assert [value % 2**64 for value in hashed(4, 5, CPU).tolist()] == expected


def test_every_row_keeps_as_many_entries_as_it_is_told():
    counts = torch.tensor([0, 1, 40, 99, 100])
    mask = drawn(counts, 100, seed=3)
    assert torch.equal(mask.sum(1), counts)
    assert torch.equal(mask, drawn(counts, 100, seed=3))
    assert not torch.equal(mask, drawn(counts, 100, seed=4))


def test_all_places_are_drawn_alike():
    mask = drawn(torch.full((4000,), 10), 40, seed=0)
    assert mask.float().mean(0).sub(0.25).abs().max() < 0.04


@pytest.mark.parametrize("density", [1.0, 0.7, 0.3, 0.05, 0.002])
def test_positions_come_back_at_about_the_expected_bits(density):
    mask = torch.rand(300, 400, generator=torch.Generator().manual_seed(0)) < density
    parts, meta = encode_positions(mask)
    assert torch.equal(decode_positions(parts, meta), mask.flatten().nonzero().squeeze(1))
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == position_shapes(meta)
    bits = sum(part.nbytes for part in parts.values()) * 8 / meta["kept"]
    assert bits == pytest.approx(rice_bits(density) if density < 1 else 1, rel=0.06)


@pytest.mark.parametrize("places", [[], [0], [99], [0, 99]], ids=str)
def test_few_positions_come_back(places):
    mask = torch.zeros(100, dtype=torch.bool)
    mask[places] = True
    assert decode_positions(*encode_positions(mask)).tolist() == places

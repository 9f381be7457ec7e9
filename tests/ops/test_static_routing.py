"""Whatever a step holds, each row is computed once by its owner's weights, from buffers of one size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meswitch.ops import SlotLinear, static_prefill
from meswitch.ops.routing import OWN_FROM, StaticRouting, most_tiles
from meswitch.ops.routing import TILE_TOKENS as TOKENS
from tests.support.deltas import expected, random_delta

ROWS, SLOTS = 512, 3
STRETCHES = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 200)), min_size=1, max_size=30)


def of(stretches):
    return [slot for slot, count in stretches for _ in range(count)][:ROWS]


@given(STRETCHES)
def test_every_row_has_one_product_and_its_owners_delta_once(stretches):
    """As on a card whose kernel restores weights: a tile's rows get its slot's weights, short pieces their deltas."""
    slots = of(stretches)
    routing = StaticRouting(ROWS, SLOTS, torch.device("cpu"))
    routing.tiles = torch.zeros(1 + most_tiles(ROWS), 4, dtype=torch.int32)
    room = len(routing.part(ROWS)[2]) - 1
    routing.fill(slots)
    every, short, tiles = routing.part(ROWS)
    count = int(tiles[0, 0])
    assert 1 <= count <= room
    weights, products = [None] * len(slots), [0] * len(slots)
    for start, first, end, slot in tiles[1 : 1 + count].tolist():
        for row in range(max(start, first), min(start + TOKENS, end)):
            assert weights[row] in (None, slot)  # a step's last tile may begin early and compute some rows again
            weights[row], products[row] = slot, products[row] + 1
    assert all(products)
    added = list(weights)
    for piece, slot in enumerate(short.slots.tolist()):
        first, end = short.starts[piece : piece + 2].tolist()
        for row in short.order[first:end].tolist():
            assert added[row] == -1
            added[row] = slot
    assert added == slots
    owned = [-1] * ROWS
    for piece, slot in enumerate(every.slots.tolist()):
        first, end = every.starts[piece : piece + 2].tolist()
        for row in every.order[first:end].tolist():
            owned[row] = slot
    assert owned == slots + [-1] * (ROWS - len(slots))


def test_steps_one_after_another_in_the_same_buffers():
    deltas = [random_delta(32, 128, 2, 64, salient=2, seed=seed) for seed in range(SLOTS)]
    layer, weight = SlotLinear.build(deltas), torch.randn(32, 128)
    routing = StaticRouting(ROWS, SLOTS, torch.device("cpu"))
    for slots, rows in (
        ([0] * 100 + [1] * 28, 128),
        ([2, -1] * 40, 96),
        ([-1] * 70, 96),
        ([1] * OWN_FROM + [2] * 3, 96),
    ):
        routing.fill(slots + [-1] * (rows - len(slots)))
        x, bias = torch.randn(rows, 128), torch.randn(32)
        y = static_prefill(x, weight, layer, routing.part(rows), bias, backend="reference")
        base = torch.nn.functional.linear(x, weight, bias)
        wanted = expected(base, x, deltas, slots + [-1] * (rows - len(slots)))
        assert torch.allclose(y.double(), wanted, atol=1e-3)


def test_more_pieces_than_there_is_room_for_are_an_error():
    routing = StaticRouting(96, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="24 pieces where there is room for 12"):
        routing.fill(list(range(24)) * 4)

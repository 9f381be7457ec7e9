"""Static buffers: what a replayed graph reads is this step's, never an earlier one's. No vLLM needed."""

import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.ops import SlotLinear, expert_linear
from meswitch.ops.routing import Side, counted, expert_counts, part
from tests.support.deltas import expected, random_delta


def products(side, tokens, deltas):
    """The op over a step, with padding after its tokens."""
    layer = SlotLinear.build(deltas)
    x, y = torch.randn(tokens, 128), torch.randn(tokens, 32)
    wanted = expected(y, x, deltas, side.host + [-1] * (tokens - len(side.host)))
    routing = side.routing(tokens)
    if routing is not None:
        expert_linear(y, x, layer, routing)
    return y.double(), wanted


def test_steps_of_all_kinds_one_after_another():
    side = Side(256, 3, torch.device("cpu"))
    deltas = [random_delta(32, 128, 2, 64, salient=2, seed=seed) for seed in range(3)]
    addresses = side.token_slots.data_ptr()
    for slots, rows in (
        ([0, -1, 2, 2, 1], 8),
        ([-1, -1], 2),
        ([1] * 150 + [0] * 70 + [-1] * 3, 223),  # more tokens of an expert than the decode kernel takes
        ([2], 1),
        ([], 4),
    ):
        side.fill(slots)
        y, wanted = products(side, rows, deltas)
        assert torch.allclose(y, wanted, atol=1e-4)
        assert side.token_slots[:rows].tolist() == (slots + [-1] * rows)[:rows]
        assert (side.token_slots[len(slots) :] == -1).all()
    assert side.token_slots.data_ptr() == addresses


def test_small_steps_have_one_shape_whatever_experts_they_hold():
    side, shapes = Side(64, 4, torch.device("cpu")), set()
    for slots in ([0] * 64, [0, 1, 2, 3] * 16, [3] + [-1] * 63):
        side.fill(slots)
        routing = side.routing(64)
        shapes.add(
            (len(routing.slots), len(routing.starts), len(routing.order), routing.piece, routing.slots.data_ptr())
        )
    assert len(shapes) == 1
    side.fill([-1] * 64)
    assert side.routing(64) is None
    assert (side._few.slots == -1).all()  # what a graph captured with experts would read


def test_a_replayed_graph_finds_every_row_once_whatever_came_before():
    """The fused kernel writes the rows of `order`: a stale one would leave rows out, or write beyond the step."""
    side = Side(64, 3, torch.device("cpu"))
    for slots in ([2, 0, 1, 2], [0] * 40, [-1, -1], [1], [-1] * 64, [2, -1, 2], []):
        side.fill(slots)
        for rows in {max(1, len(slots)), 8, 33, 64} - set(range(1, len(slots))):
            assert sorted(side._few.order[:rows].tolist()) == list(range(rows))
        owned = side._few.order[: side._few.starts[-1]].tolist()
        assert sorted(owned) == [row for row, slot in enumerate(slots) if slot >= 0]


def test_graphs_for_each_number_of_experts_have_pieces_for_just_as_many():
    side = Side(64, 16, torch.device("cpu"), specialized=True)
    counts = []
    for experts in (1, 4, 16):
        side.fill([row % experts for row in range(32)])
        routing = side.routing(32)
        counts.append((routing.slots.numel(), routing.likely))
        assert (routing.slots >= 0).sum() == max(experts, 4)
    assert counts == [(4, 4), (7, 4), (18, 16)]


@pytest.mark.parametrize(("slots", "counts"), [(0, []), (1, [1]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_a_step_of_any_number_of_experts_has_a_graph_of_as_many_or_more(slots, counts):
    assert expert_counts(slots) == counts
    assert counted(0, slots) == 0
    for experts in range(1, slots + 1):
        assert counted(experts, slots) == min(count for count in counts if count >= experts)


def test_a_step_can_be_computed_as_if_it_had_more_experts():
    side = Side(64, 16, torch.device("cpu"), specialized=True)
    side.least_experts = 5
    side.fill([0, 1, -1])
    few = side.routing(32)
    assert (few.slots.numel(), few.likely) == (11, 8)
    assert sorted(few.slots[few.slots >= 0].tolist()) == [0, 1]
    side.fill([-1] * 3)
    assert side.routing(32) is None


def test_part_of_a_step_and_a_step_too_long():
    side = Side(16, 2, torch.device("cpu"))
    side.fill([0] * 4 + [1] * 5 + [-1] * 3)
    routing = part(side, 2, 4)
    assert routing.slots[:2].tolist() == [0, 1]
    assert routing.order.tolist() == [0, 1, 2, 3]
    assert part(side, 9, 3) is None
    assert part(side, 10, 5) is None
    with pytest.raises(ConfigError, match="17 rows in a step that was announced with at most 16"):
        side.fill([0] * 17)

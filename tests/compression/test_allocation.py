"""Sharing out bytes over tensors."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from meswitch.codec import Spec
from meswitch.compression.budget import Candidate, allocate, hull


def ways(*points: tuple[int, float]) -> list[Candidate]:
    return [Candidate(Spec(bits=1 + i % 4), nbytes, harm) for i, (nbytes, harm) in enumerate(points)]


def test_the_hull_leaves_out_what_pays_less_than_a_mix_of_its_neighbours():
    found = hull(ways((10, 8.0), (20, 7.9), (30, 1.0), (40, 0.9)))
    assert [c.nbytes for c in found] == [10, 30, 40]


def test_bytes_go_where_they_avoid_most_harm():
    offers = {"calm": ways((10, 1.0), (20, 0.9)), "touchy": ways((10, 5.0), (20, 1.0))}
    specs = allocate(offers, 30)
    assert (specs["calm"].bits, specs["touchy"].bits) == (1, 2)


def test_what_does_not_fit_leaves_its_bytes_to_a_smaller_step():
    offers = {"large": ways((10, 9.0), (110, 0.0)), "small": ways((10, 1.0), (20, 0.9))}
    specs = allocate(offers, 40)
    assert (specs["large"].bits, specs["small"].bits) == (1, 2)


def test_too_small_a_budget_is_no_mix_at_all():
    assert allocate({"a": ways((10, 1.0))}, 9) is None


curves = st.lists(
    st.tuples(st.integers(1, 50), st.floats(0.0, 100.0)), min_size=1, max_size=4, unique_by=lambda p: p[0]
)


@given(st.lists(curves, min_size=1, max_size=4), st.integers(4, 200))
def test_no_budget_is_overrun_and_at_most_one_step_is_missed(points, budget):
    offers = {str(i): ways(*curve) for i, curve in enumerate(points)}
    specs = allocate(offers, budget)
    mixes = [mix for mix in itertools.product(*offers.values()) if sum(c.nbytes for c in mix) <= budget]
    if not mixes:
        assert specs is None
        return
    chosen = [next(c for c in offers[name] if c.spec == spec) for name, spec in specs.items()]
    assert sum(c.nbytes for c in chosen) <= budget
    # the greedy solution is at most the largest single step away from the best mix
    step = max((c.harm for curve in offers.values() for c in curve), default=0.0)
    assert sum(c.harm for c in chosen) <= min(sum(c.harm for c in mix) for mix in mixes) + step + 1e-6

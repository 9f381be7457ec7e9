"""Experts added by a few examples."""

import pytest
import torch

from meswitch.router import OTHER, RouterError, Row, add_experts, evaluate_router, load_router, train_router

OLD = ("math", "code", "instruct")


@pytest.fixture(scope="module")
def few(all_rows):
    return [row for row in all_rows if row.domain == "sql"][:16]


@pytest.fixture(scope="module")
def old(all_rows, encoder):
    """A router that has never seen a row of sql."""
    return train_router([row for row in all_rows[::4] if row.domain != "sql"], OLD, encoder)


@pytest.fixture(scope="module")
def grown(old, few):
    return add_experts(old, few)


def test_sixteen_examples_make_an_expert_and_cost_the_others_little(old, grown, unseen, few):
    seen = {row.query for row in few}
    rows = [row for row in unseen if row.query not in seen and row.domain != OTHER]
    before = evaluate_router(old, [row for row in rows if row.domain in OLD]).accuracy
    after = evaluate_router(grown, rows).per_domain
    assert after["sql"] > 0.9
    assert sum(after[name] for name in OLD) / 3 > before - 0.05


def test_queries_of_a_new_expert_are_answered(grown, unseen):
    others = evaluate_router(grown, [row for row in unseen if row.domain in ("sql", OTHER)])
    assert others.coverage > 0.6
    assert others.per_domain[OTHER] > 0.8


def test_the_old_experts_are_told_apart_as_before(old, grown, unseen):
    asked = [[{"role": "user", "content": row.query}] for row in unseen[:50]]
    for before, after in zip(old.scores(asked), grown.scores(asked), strict=True):
        ratios = [torch.tensor([scores[name] + 1e-30 for name in OLD]).log() for scores in (before, after)]
        assert (ratios[0] - ratios[0].max()).tolist() == pytest.approx((ratios[1] - ratios[1].max()).tolist(), abs=1e-3)


def test_a_grown_router_is_kept_and_can_grow_again(grown, base, tmp_path):
    grown.save(tmp_path / "router")
    loaded = load_router(tmp_path / "router", base, experts=(*OLD, "sql"))
    query = "List the names of all singers in the table."
    assert loaded.route(query).scores == pytest.approx(grown.route(query).scores, abs=1e-6)
    assert loaded.provenance.rows["sql"] == 16
    law = [Row(f"Is clause {i} of the contract void?", "law") for i in range(8)]
    again = add_experts(loaded, law)
    again.save(tmp_path / "router")
    assert load_router(tmp_path / "router", base).route("Is clause 77 of the contract void?").choice == "law"


def test_a_router_that_knows_no_others_can_grow(all_rows, few, encoder):
    rows = [row for row in all_rows[::8] if row.domain in OLD]
    grown = add_experts(train_router(rows, OLD, encoder), few)
    assert set(grown.route("hello").scores) == {*OLD, "sql"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "examples: none"),
        ([Row("2 + 2", "math")] * 5, "'math' is known"),
        ([Row("x", OTHER)] * 5, "'other' is known"),
        ([Row("the same", "law")] * 9, "'law' has 1 different ones"),
    ],
)
def test_examples_that_cannot_add_an_expert(old, rows, message):
    with pytest.raises(RouterError, match=message):
        add_experts(old, rows)

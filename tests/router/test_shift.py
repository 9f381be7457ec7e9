"""Offsets from sources that were left out of the training."""

import pytest
import torch

from meswitch.router import OTHER, Row, train_router
from meswitch.router.train import offsets, sources_of


def rows_of(domain, source, count):
    return [Row(f"{source} {i}", domain, source) for i in range(count)]


def test_only_domains_with_two_sources_of_some_size_have_something_to_leave_out():
    rows = [
        *rows_of("sql", "atlas", 30),
        *rows_of("sql", "flights", 25),
        *rows_of("math", "school", 90),
        *rows_of("code", "puzzles", 40),
        *rows_of("code", "tiny", 3),
    ]
    assert sources_of(rows) == {"sql": ["atlas", "flights"]}


def test_of_many_sources_the_largest_are_left_out():
    rows = [row for i in range(12) for row in rows_of("sql", f"s{i:02}", 20 + i)]
    assert sources_of(rows) == {"sql": [f"s{i:02}" for i in range(11, 3, -1)]}


@pytest.fixture
def far():
    """Rows of two experts from unseen sources, of which the second's lose by 2; the third has none."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, 1]).repeat(200)
    logits = torch.randn(400, 3, generator=generator)
    logits[:, 2] = -9.0
    logits[torch.arange(400), targets] += 2.0
    logits[:, 1] -= 4.0
    return logits, targets


def test_an_expert_that_loses_unseen_sources_gets_a_head_start_and_one_without_evidence_none(far):
    logits, targets = far
    near = torch.eye(3).repeat(100, 1) * 8.0
    free = torch.tensor([True, True, False])
    found = offsets(near, torch.arange(3).repeat(100), logits, targets, targets, free)
    assert found[1] > 0.5
    assert found[2] == 0
    assert float(found.sum()) == pytest.approx(0, abs=1e-5)
    before, after = ((z.argmax(1) == targets).float().mean() for z in (logits, logits + found))
    assert after > before + 0.05
    assert ((near + found).argmax(1) == near.argmax(1)).all()


def test_a_large_source_counts_no_more_than_a_small_one(far):
    logits, targets = far
    near, near_targets = torch.eye(3).repeat(100, 1) * 8.0, torch.arange(3).repeat(100)
    free = torch.tensor([True, True, False])
    groups = targets * 2
    once = offsets(near, near_targets, logits, targets, groups, free)
    easy = torch.tensor([[0.0, 20.0, -9.0]]).expand(2, 3)  # another source of the second expert, of no difficulty
    one, two = torch.ones(1, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    with_one = offsets(
        near, near_targets, torch.cat([logits, easy[:1]]), torch.cat([targets, one]), torch.cat([groups, 3 * one]), free
    )
    with_two = offsets(
        near, near_targets, torch.cat([logits, easy]), torch.cat([targets, two]), torch.cat([groups, 3 * two]), free
    )
    assert torch.allclose(with_one, with_two, atol=1e-3)
    assert with_one[1] < once[1]


def test_training_uses_sources_if_there_are_and_does_without(rows, encoder):
    few = [row for row in rows if row.domain in ("math", "code", OTHER)][:300]
    halves = [Row(row.query, row.domain, f"{row.domain}-{i % 2}") for i, row in enumerate(few)]
    plain = [Row(row.query, row.domain) for row in few]
    with_sources, without = (train_router(some, ["math", "code"], encoder) for some in (halves, plain))
    assert torch.equal(with_sources.heads.states.weight, without.heads.states.weight)
    assert not torch.equal(with_sources.heads.states.bias, without.heads.states.bias)

import json
import shutil

import pytest
import torch

from meswitch.router import OTHER, CascadeRouter, RouterError, fit_cascade, load_router
from meswitch.router.base import as_messages
from meswitch.router.cascade import leads, log_scores, unsure
from meswitch.router.store import ScoreCalibration

QUERIES = ["What is 17 + 25?", "Write f(x) that doubles x.", "How many users are there?", "book a table for two"]
LABELS = ("math", "code", "instruct", "sql", OTHER)
PLAIN = ScoreCalibration(1.0, 0.5, 0.0, 0.0)


class Counted:
    """A router that remembers what it was asked."""

    def __init__(self, router):
        self.router, self.asked = router, []

    def __getattr__(self, name):
        return getattr(self.router, name)

    def scores(self, batch):
        self.asked += [messages[-1]["content"] for messages in batch]
        return self.router.scores(batch)


@pytest.fixture(scope="module")
def second(all_rows, encoder):
    """Another router over the same experts: other rows, the experts in another order."""
    from meswitch.router import train_router

    return train_router(all_rows[3::8], ("sql", "instruct", "code", "math"), encoder)


@pytest.fixture(scope="module")
def cascade(router, second, unseen):
    return fit_cascade(router, second, unseen, asked=0.3)


def test_only_unsure_queries_reach_the_second_router(router, second):
    counted = Counted(second)
    logits = log_scores(router, [as_messages(query) for query in QUERIES], LABELS)
    margin = float(leads(logits).sort().values[1:3].mean())
    CascadeRouter(router, counted, PLAIN, margin=margin, weight=1.0).route_batch(QUERIES)
    assert len(counted.asked) == 2


def test_a_sure_answer_is_the_first_routers(router, second):
    routes = CascadeRouter(router, second, PLAIN, margin=0.0, weight=1.0).route_batch(QUERIES)
    for route, alone in zip(routes, router.route_batch(QUERIES), strict=True):
        assert route.scores == pytest.approx(alone.scores, abs=1e-4)


def test_an_ensemble_asks_both_and_averages(router, second):
    both = CascadeRouter(router, second, PLAIN, margin=None, weight=0.5).scores([as_messages(QUERIES[3])])[0]
    one, two = (r.route(QUERIES[3]).scores for r in (router, second))
    mean = torch.tensor([one[name] * two[name] for name in both], dtype=torch.float64).sqrt()
    assert list(both.values()) == pytest.approx((mean / mean.sum()).tolist(), abs=1e-3)
    assert sum(both.values()) == pytest.approx(1)


def test_the_share_asked_is_the_share_wanted(router, cascade, unseen):
    logits = log_scores(router, [as_messages(row.query) for row in unseen], LABELS)
    assert float(unsure(logits, cascade.margin).double().mean()) == pytest.approx(0.3, abs=0.05)


def test_a_fitted_cascade_is_calibrated_and_no_worse_than_the_first(router, cascade, unseen, result):
    assert cascade.calibration.accuracy >= result.accuracy - 0.01
    assert 0 <= cascade.weight <= 1
    assert 0 < cascade.threshold < 1


def test_a_cascade_is_saved_with_both_routers(cascade, base, tmp_path):
    cascade.save(tmp_path / "cascade")
    loaded = load_router(tmp_path / "cascade", base, experts=cascade.experts)
    assert (loaded.margin, loaded.weight, loaded.calibration) == (cascade.margin, cascade.weight, cascade.calibration)
    for ours, theirs in zip(loaded.route_batch(QUERIES), cascade.route_batch(QUERIES), strict=True):
        assert ours.scores == theirs.scores


def test_a_member_that_was_exchanged_is_refused(cascade, base, tmp_path):
    path = tmp_path / "cascade"
    cascade.save(path)
    shutil.rmtree(path / "second")
    with pytest.raises(RouterError, match="second"):
        load_router(path, base)
    shutil.copytree(path / "first", path / "second")
    with pytest.raises(RouterError, match=r"members\.second: does not match"):
        load_router(path, base)


def test_a_cascade_without_its_members_field_is_refused(cascade, base, tmp_path):
    path = tmp_path / "cascade"
    cascade.save(path)
    data = json.loads((path / "router.json").read_text())
    (path / "router.json").write_text(json.dumps(data | {"members": {}}))
    with pytest.raises(RouterError, match="members: expected first, second"):
        load_router(path, base)


def test_routers_of_other_experts_do_not_go_together(router, encoder, all_rows):
    from meswitch.router import train_router

    rows = [row for row in all_rows[::4] if row.domain in ("math", "code")]
    with pytest.raises(RouterError, match="the second math, code"):
        CascadeRouter(router, train_router(rows, ("math", "code"), encoder), PLAIN, margin=None, weight=0.5)

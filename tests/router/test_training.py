import pytest
import torch

from meswitch.router import OTHER, RouterError, Row, evaluate_router, train_router
from meswitch.router.data import folds
from meswitch.router.embedding import tensors_of

EXPERTS = ("math", "code", "instruct", "sql")


@pytest.fixture(scope="module")
def few(rows):
    return rows[:150]


def queries(domain, count):
    return [Row(f"{domain} question number {i}", domain) for i in range(count)]


def test_a_few_hundred_rows_are_enough_for_queries_like_them(result):
    assert result.accuracy > 0.97
    assert result.auroc > 0.97
    assert result.coverage > 0.9


def test_the_held_out_figures_say_what_unseen_rows_will_show(router, result):
    assert router.calibration.accuracy == pytest.approx(result.accuracy, abs=0.03)
    assert router.calibration.ece < 0.05


def test_training_twice_gives_the_same_router(few, encoder):
    first, second = train_router(few, EXPERTS, encoder), train_router(few, EXPERTS, encoder)
    assert first.calibration == second.calibration
    ours, theirs = tensors_of(first.heads, first.learnt.rows), tensors_of(second.heads, second.learnt.rows)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_leaves_the_number_of_threads_alone(few, encoder):
    before = torch.get_num_threads()
    train_router(few, EXPERTS, encoder)
    assert torch.get_num_threads() == before


def test_without_other_rows_nearly_all_known_queries_are_answered(rows, unseen, encoder):
    router = train_router([row for row in rows if row.domain != OTHER], EXPERTS, encoder)
    assert router.calibration.auroc is None
    assert set(router.route("2 + 2?").scores) == set(EXPERTS)
    result = evaluate_router(router, [row for row in unseen if row.domain != OTHER])
    assert result.coverage > 0.95
    assert result.accuracy > 0.97


def test_one_expert_against_other_can_be_trained(rows, encoder):
    router = train_router([row for row in rows if row.domain in ("sql", OTHER)], ("sql",), encoder)
    route = router.route("Write a SQL query: how many rivers are there?")
    assert (route.choice, set(route.scores)) == ("sql", {"sql", OTHER})
    assert route.margin == route.scores["sql"]


def test_equal_queries_are_never_on_both_sides_of_the_calibration_split():
    rows = [*queries("math", 20), *queries("code", 20)]
    rows += [Row(f"  {row.query.upper()} ", row.domain) for row in rows]
    fold = folds(rows, 5, seed=0)
    assert torch.equal(fold[:40], fold[40:])


def test_every_fold_has_rows_of_every_domain():
    rows = [*queries("math", 50), *queries("code", 7)]
    fold = folds(rows, 5, seed=3)
    assert set(fold[50:].tolist()) == {0, 1, 2, 3, 4}
    assert torch.bincount(fold[:50]).tolist() == [10] * 5


@pytest.mark.parametrize(
    ("rows", "experts", "message"),
    [
        (queries("math", 9), ("math", "code"), "'code' has 0 distinct queries"),
        ([*queries("math", 9), *queries("code", 1) * 9], ("math", "code"), "'code' has 1 distinct queries"),
        ([*queries("math", 9), *queries("poetry", 9)], ("math",), "'poetry' is no expert"),
        ([*queries("math", 9), *queries(OTHER, 2)], ("math",), "'other' has 2 distinct queries"),
        (queries("math", 9), ("math",), "nothing to tell apart"),
        (queries(OTHER, 9), (OTHER,), "rename the expert"),
    ],
)
def test_data_that_cannot_train_a_router_is_refused(rows, experts, message, encoder):
    with pytest.raises(RouterError, match=message):
        train_router(rows, experts, encoder)


def test_progress_counts_up_to_all_rows(few, encoder):
    seen = []
    train_router(few, EXPERTS, encoder, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    done, total = seen[-1]
    assert done == total >= len(few)  # copies of rows are read too

import copy
import json

import pytest

from meswitch.router import OTHER, Row, evaluate_router

KEYS = {"accuracy", "per_domain", "per_source", "confusion", "ece", "auroc", "coverage", "latency_ms"}


def test_the_figures_have_these_keys_and_are_plain_json(result):
    data = json.loads(json.dumps(result.to_dict()))
    assert set(data) == KEYS
    assert all(0 <= data[key] <= 1 for key in ("accuracy", "ece", "auroc", "coverage"))
    assert set(data["latency_ms"]) == {"mean", "p50", "p95"}


def test_confusion_counts_every_row_once(result, router, unseen):
    assert list(result.confusion) == [*router.experts, OTHER]
    for domain, row in result.confusion.items():
        assert sum(row.values()) == sum(r.domain == domain for r in unseen)


def test_coverage_and_refusals_are_those_of_the_confusion_table(result, router):
    known = [result.confusion[name] for name in router.experts]
    total = sum(sum(row.values()) for row in known)
    assert result.coverage == pytest.approx(1 - sum(row[OTHER] for row in known) / total)
    others = result.confusion[OTHER]
    assert result.per_domain[OTHER] == pytest.approx(others[OTHER] / sum(others.values()))


def test_accuracy_ignores_other_rows_and_the_threshold(result, router, unseen):
    known = [row for row in unseen if row.domain != OTHER]
    strict = copy.copy(router)
    strict.threshold = 1.0
    again = evaluate_router(strict, known)
    assert again.accuracy == pytest.approx(result.accuracy)
    assert (again.coverage, again.auroc) == (0.0, None)


def test_accuracy_is_the_mean_over_the_domains_rows(result, router, unseen):
    right = sum(result.per_domain[r.domain] for r in unseen if r.domain != OTHER)
    assert result.accuracy == pytest.approx(right / sum(r.domain != OTHER for r in unseen))


def test_sources_are_told_apart(router):
    rows = [Row("What is 3 + 4 apples?", "math", "a"), Row("What is 3 + 4 apples?", "sql", "b")]
    result = evaluate_router(router, rows)
    assert result.per_source == {"a": 1.0, "b": 0.0}
    assert result.accuracy == 0.5


def test_only_other_rows_give_no_accuracy(router):
    result = evaluate_router(router, [Row("lock my bank account", OTHER)])
    assert (result.accuracy, result.ece, result.auroc, result.coverage) == (None, None, None, None)


def test_one_query_takes_milliseconds(result):
    assert result.latency_ms["p50"] < 200  # about 6 on an idle core

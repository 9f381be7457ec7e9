import copy
import json

import pytest
import torch

from meswitch.router import OTHER, Row, evaluate_router
from meswitch.router.evaluate import accepted, markdown, reliability, risk_coverage

KEYS = {"accuracy", "per_domain", "per_source", "confusion", "ece", "auroc", "coverage", "latency_ms"}
KEYS |= {"risk_coverage", "reliability", "accepted_other", "unlabelled", "bytes"}


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


def test_the_surest_rows_err_least_and_all_rows_err_as_accuracy_says():
    curve = risk_coverage(torch.tensor([0.9, 0.8, 0.6, 0.5]), torch.tensor([True, True, False, True]), points=4)
    assert curve == [(0.25, 0.0), (0.5, 0.0), (0.75, 1 / 3), (1.0, 0.25)]


def test_accepted_counts_others_as_sure_as_the_nearly_least_sure_known():
    known, other = torch.arange(1, 21) / 20, torch.tensor([0.05, 0.09, 0.1, 0.5])
    assert accepted(known, other) == 0.5  # 19 of 20 known are at 0.1 or above
    assert accepted(known, other[:0]) is None


def test_rows_without_the_label_that_others_of_their_domain_carry_are_reported_apart(router):
    rows = [Row(f"Write a SQL query: list all rivers of {i}", "sql") for i in range(6)]
    result = evaluate_router(router, [*rows, Row("Write a Python function that adds two numbers.", "sql")])
    assert result.unlabelled == {"sql": 0.0}


def test_reliability_is_what_the_calibration_error_compares(result, unseen):
    rows = sum(count for _, _, count in result.reliability)
    assert rows == sum(row.domain != OTHER for row in unseen)
    gaps = sum(abs(sure - right) * count for sure, right, count in result.reliability)
    assert gaps / rows == pytest.approx(result.ece)
    assert reliability(torch.tensor([0.9, 0.92, 0.1]), torch.tensor([True, False, True])) == [
        (pytest.approx(0.1), 1.0, 1),
        (pytest.approx(0.91), 0.5, 2),
    ]


def test_a_report_without_figures_says_so(router):
    page = markdown(evaluate_router(router, [Row("lock my bank account", OTHER)]))
    assert "| accuracy | - |" in page

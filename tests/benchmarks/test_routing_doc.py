"""docs/results/routing.md says what the stored results say."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def document(benchmark_script):
    return benchmark_script("routing.doc")


def test_the_page_is_made_from_the_stored_results(document):
    document.main(["--check"])


def test_results_of_an_llm_router_get_their_row(document, tmp_path):
    row = {
        "model": "tiny",
        "params": 135_000_000,
        "variant": "lora",
        "data": "dev",
        "rows": 9,
        "accuracy": 0.96,
        "per_domain": {"sql": 0.9},
    }
    row |= {"ece": 0.02, "auroc": 0.97, "latency_ms": {"p50": 9.0}, "bytes": 270_000_000}
    (tmp_path / "routing-llm.json").write_text(json.dumps({"results": [row]}))
    page = tmp_path / "routing.md"
    page.write_text((ROOT / "docs" / "results" / "routing.md").read_text())
    where = ["--results", str(tmp_path), "--doc", str(page)]
    with pytest.raises(SystemExit, match="older than the results"):
        document.main(["--check", *where])
    document.main(where)
    document.main(["--check", *where])
    assert "| tiny | 135 M | lora | dev | 9 | 0.960 | - | - | - | 0.900 |" in page.read_text()


def test_an_expert_known_by_description_is_compared_with_the_router_before_it(document):
    before = {"kind": "llm", "variant": "without-law", "data": "dev", "device": "cpu", "rows": 8, "auroc": 0.9}
    before |= {"per_domain": {"math": 0.9, "sql": 0.7, "other": 0.1}, "settings": {"steps": 5, "batch": 2}}
    after = before | {"variant": "added-law", "per_domain": {"math": 0.8, "sql": 0.6, "law": 0.5, "other": 0.2}}
    table = document.described({"results": [before, after | {"rows": 9, "auroc": 0.8}]})
    assert table.splitlines()[2] == "| law | dev | 9 | 5 x 2 | 0.800 | 0.700 | 0.500 | 0.900 | 0.800 |"
    assert document.described({"results": [after]}) == "Not measured yet."

"""docs/vllm.md says what the stored result says."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def doc():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("vllm_doc")


def test_the_page_is_made_from_the_stored_result(doc) -> None:
    doc.main(["--check"])


def test_shares_are_of_the_base_with_as_many_requests(doc) -> None:
    times = {"median_ttft_ms": 50.0}
    rows = [
        {"engine": "meswitch", "concurrency": 8, "experts": 4, "output_throughput": 60.0, "median_tpot_ms": 10.0}
        | times,
        {"engine": "base", "concurrency": 32, "experts": 0, "output_throughput": 300.0, "median_tpot_ms": 6.0} | times,
        {"engine": "base", "concurrency": 8, "experts": 0, "output_throughput": 100.0, "median_tpot_ms": 8.0} | times,
    ]
    assert "| meswitch | 8 | 4 | 60 | 0.60 | 0.80 | 50.0 | 10.0 |" in doc.table(rows)

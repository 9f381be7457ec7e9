"""docs/results/kernels.md says what the stored results say."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def doc(benchmark_script):
    return benchmark_script("kernels.doc")


def test_the_page_and_its_plots_are_made_from_the_stored_result(doc) -> None:
    doc.main(["--check"])


def test_an_older_table_is_told(doc, tmp_path: Path) -> None:
    page = tmp_path / "kernels.md"
    text = (ROOT / "docs" / "results" / "kernels.md").read_text()
    page.write_text(text.replace("| mistral-7b | 1 | 1 | fused |", "| mistral-7b | 1 | 1 | slow |"))
    with pytest.raises(SystemExit, match=r"kernels.md, kernels/floor.svg, kernels/step.svg: older than the results"):
        doc.main(["--check", "--doc", str(page)])
    doc.main(["--doc", str(page)])
    assert page.read_text() == text

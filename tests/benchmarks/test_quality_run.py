"""`benchmarks/quality/run.py` in small: it measures, goes on where it was, and records what fails."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RTN = {"method": "rtn", "calibration": None, "bits": 2, "group_size": None}
LABEL = "rtn: 2 bits, a scale a row"
OPTIONS = ("frontier", "--experts", "math", "--questions", "20", "--fidelity-questions", "8", "--only", LABEL)


@pytest.fixture(scope="module")
def quality(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    """The command's module, to run it without waiting for another Python."""
    return benchmark_script("quality.run")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command stored, with two worker processes."""
    out = tmp_path_factory.mktemp("quality") / "frontier.json"
    command = [sys.executable, str(BENCHMARKS / "quality" / "run.py"), *OPTIONS, "--jobs", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 jobs to do" in done.stdout
    return out


def test_a_job_has_size_answers_fidelity_and_seconds(measured: Path) -> None:
    data = json.loads(measured.read_text())
    [job] = data["jobs"]
    reference = data["references"]["math"]
    assert job["keywords"] == RTN
    assert 2 < job["bits_per_weight"] < 2.3
    assert set(job["outcomes"]) <= {"0", "1"}
    assert (len(job["outcomes"]), job["outcomes"].count("1")) == (20, job["correct"])
    gained = reference["expert"]["correct"] - reference["base"]["correct"]
    assert job["gain"] == pytest.approx((job["correct"] - reference["base"]["correct"]) / gained)
    assert job["interval"][0] <= job["gain"] <= job["interval"][1]
    assert 0 < job["kl"] < reference["base_fidelity"]["kl"]
    assert (len(job["kl_by_text"]), job["sequences"]) == (8, 8)
    assert set(job["seconds"]) == {"compress", "load", "accuracy", "fidelity"}


def test_what_repeats_it_is_stored_and_no_path_of_this_machine(measured: Path) -> None:
    text = measured.read_text()
    data = json.loads(text)
    [entry] = data["runs"]
    assert entry["command"].startswith("python benchmarks/quality/run.py frontier --questions 20 --seed 2")
    assert "--family examples/family --experts math" in entry["command"]
    assert {"date", "device", "python", "torch", "transformers", "meswitch", "commit"} < set(entry)
    assert set(data["meta"]["checksums"]) == {"base", "math"}
    assert not re.search(r'"[^"]*/(home|root|tmp|work)/', text)


def test_what_is_stored_is_not_measured_again(
    measured: Path, quality: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads(measured.read_text())
    quality.main([*OPTIONS, "--out", str(measured)])
    assert "0 jobs to do" in capsys.readouterr().out
    assert json.loads(measured.read_text()) == before


def test_an_expert_can_be_added_later(
    measured: Path, tmp_path: Path, quality: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copy(measured, tmp_path))
    quality.main([*OPTIONS, "--experts", "math", "sql", "--out", str(out)])
    assert "1 jobs to do, 2 rows chosen" in capsys.readouterr().out
    data = json.loads(out.read_text())
    assert [job["expert"] for job in data["jobs"]] == ["math", "sql"]
    assert set(data["meta"]["checksums"]) == {"base", "math", "sql"}
    assert "correct" not in data["jobs"][1]  # sql has no exact check
    assert data["jobs"][1]["kl"] > 0


def test_results_of_other_questions_are_not_mixed(measured: Path, quality: ModuleType) -> None:
    with pytest.raises(SystemExit, match="holds results of another seed; choose another --out"):
        quality.main([*OPTIONS, "--seed", "3", "--out", str(measured)])


def test_results_of_other_weights_are_not_mixed(measured: Path, tmp_path: Path, quality: ModuleType) -> None:
    for name in ("base", "math"):
        shutil.copytree(quality.experiment.EXAMPLE / name, tmp_path / name)
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "math")
    with pytest.raises(SystemExit, match="holds results of another math; choose another --out"):
        quality.main([*OPTIONS, "--family", str(tmp_path), "--out", str(measured)])


def test_an_unknown_keyword_fails_in_its_row_only_and_is_tried_again(
    measured: Path,
    tmp_path: Path,
    quality: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    setting = importlib.import_module("benchmarks.quality.settings").Setting
    rows = [setting("rtn", f"{LABEL}{i}", RTN | extra) for i, extra in enumerate(({"ratio": 1.6}, {}, {"bits": 1}))]
    monkeypatch.setitem(quality.SUITES, "frontier", rows)
    out = Path(shutil.copy(measured, tmp_path))
    quality.main([*(option.replace(LABEL, "rtn") for option in OPTIONS), "--out", str(out)])
    assert "2 jobs to do" in capsys.readouterr().out
    jobs = {json.dumps(job["keywords"]): job for job in json.loads(out.read_text())["jobs"]}
    assert ["failed" in jobs[json.dumps(row.keywords)] for row in rows] == [True, False, False]
    failed = jobs[json.dumps(rows[0].keywords)]["failed"]
    assert re.match(r"ConfigError: ratio: the method rtn has no such parameter", failed)
    quality.main([*(option.replace(LABEL, "rtn") for option in OPTIONS), "--out", str(out)])
    assert "1 jobs to do" in capsys.readouterr().out

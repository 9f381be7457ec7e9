"""The scripts of `benchmarks/` can be run from anywhere: each begins with its own folder on the path."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = sorted(BENCHMARKS.glob("*/*.py"))


def test_no_script_or_folder_hides_a_package():
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) | {"vllm", "ray", "humming"}
    assert {file.stem for file in FILES} & taken == set()
    assert {file.parent.name for file in FILES} & taken == set()


@pytest.mark.parametrize("script", ["kernels/ops.py", "quality/doc.py", "serving/vllm_server.py", "common/readme.py"])
def test_a_script_runs_alone(script, tmp_path):
    command = [sys.executable, str(BENCHMARKS / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"benchmarks/{script}" in done.stdout


def test_the_readme_names_every_script_and_no_other():
    scripts = {str(file.relative_to(BENCHMARKS)) for file in FILES if "__main__" in file.read_text()}
    rows = re.findall(r"^\| `(\w+/\w+\.py)` \|", (BENCHMARKS / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(scripts)

"""The 7B recipe, end to end at a tiny width; its tables and family files."""

import importlib.util
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meswitch.cli import app
from meswitch.family import Family

RECIPE = Path(__file__).parents[2] / "examples" / "mistral-7b"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def in_this_process(*command):
    """What `run.in_a_process` does, without starting Python a dozen times."""
    done = CliRunner().invoke(app, list(command))
    assert done.exit_code == 0, done.output
    return done.stdout, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
def test_the_recipe_runs_end_to_end_at_a_tiny_width(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    widths = [word for field, value in TINY.items() for word in ("--set", f"{field}={value}")]
    arguments = ["--synthetic", *widths, "--out", str(tmp_path / "work"), "--json", str(tmp_path / "found.json")]
    found = load("run").main(arguments, run=in_this_process)
    assert json.loads((tmp_path / "found.json").read_text())["experts"] == found["experts"]
    assert [(row["expert"], row["vocab_size"]) for row in found["experts"]] == [
        ("dolphin", 2050), ("code", 2048), ("math", 2049)
    ]  # fmt: skip
    assert all(row["planned_bytes"] == row["tensor_bytes"] for row in found["experts"])
    assert found["answer"]["text"]
    assert found["answer"]["merged_agrees"]
    assert found["answer"]["server_agrees"]
    assert set(found["answer"]["served"]) == {"dolphin", "code", "math"}


@pytest.mark.parametrize("name", ["mistral-7b", "llama-2-13b"])
def test_every_expert_of_a_family_file_has_a_configuration_and_a_text(name):
    family = Family.load(RECIPE / f"{name}.toml")
    assert {path.name for path in (RECIPE / "configs" / name).iterdir()} == {"base", *family.names}
    assert {section.calibration for section in family.expert} == {f"calibration/{n}.jsonl" for n in family.names}
    assert set(family.names) <= set(load("calibration").SOURCES)


@pytest.mark.slow
def test_the_tables_are_those_of_plan_and_of_the_stored_run():
    command = [sys.executable, str(RECIPE / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_stored_run_had_the_true_widths_and_succeeded():
    stored = json.loads((RECIPE / "synthetic.json").read_text())
    assert not set(TINY) & set(stored["synthetic"])
    assert stored["answer"]["text"]
    assert stored["answer"]["merged_agrees"]
    assert stored["answer"]["server_agrees"]
    assert all(row["planned_bytes"] == row["tensor_bytes"] for row in stored["experts"])

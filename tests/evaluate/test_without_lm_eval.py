"""What can be said about lm-eval's tasks where it is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meswitch.cli import app
from meswitch.errors import ConfigError
from meswitch.evaluate import evaluate_family

MISSING = r"pip install 'meswitch\[lm-eval\]'"


def test_the_extra_to_install_is_named(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=MISSING):
        evaluate_family(family / "base", {}, tasks=["arc_easy"])


def test_the_command_names_the_extra_in_one_line() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from meswitch.evaluate.lm_eval import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: lm-eval is not installed; pip install 'meswitch[lm-eval]'\n")


def test_options_about_lm_evals_tasks_want_one() -> None:
    result = CliRunner().invoke(app, ["eval", "--base", "b", "--num-fewshot", "0"])
    assert result.exit_code == 1
    assert "name --tasks" in result.stderr

"""What can be said about lm-eval's tasks where it is not installed."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meswitch.cli import app
from meswitch.errors import ConfigError
from meswitch.evaluate import evaluate_family
from meswitch.evaluate.lm_eval import main

MISSING = r"pip install 'meswitch\[lm-eval\]'"


def test_the_extra_to_install_is_named(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=MISSING):
        evaluate_family(family / "base", {}, tasks=["arc_easy"])


def test_the_command_names_the_extra_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == "error: lm-eval is not installed; pip install 'meswitch[lm-eval]'"


def test_options_about_lm_evals_tasks_want_one() -> None:
    result = CliRunner().invoke(app, ["eval", "--base", "b", "--num-fewshot", "0"])
    assert result.exit_code == 1
    assert "name --tasks" in result.stderr

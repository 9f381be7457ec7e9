import json
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from meswitch.artifact import Artifact
from meswitch.cli.eval import evaluate
from meswitch.errors import ArtifactError, CheckpointError, ConfigError, IncompatibleError
from meswitch.evaluate import Report, Settings, evaluate_family

FEW = Settings(n=40, seed=6, fidelity_n=8)


@pytest.fixture(scope="module")
def report(family: Path, math_delta: Path) -> Report:
    experts = {"math": family / "math", "sql": family / "sql"}
    return evaluate_family(family / "base", experts, {"math": math_delta}, settings=FEW)


def test_each_expert_is_asked_its_own_domain_and_the_base_all_of_them(report: Report) -> None:
    assert [(row.task, row.model, row.kind) for row in report.rows] == [
        ("math", "base", "base"),
        ("math", "math", "expert"),
        ("math", "math", "delta"),
        ("sql", "base", "base"),
        ("sql", "sql", "expert"),
    ]


def test_a_four_bit_delta_keeps_the_gain_and_follows_the_expert(report: Report, math_delta: Path) -> None:
    row = report.get("math", "math", "delta")
    assert row.gain is not None
    assert row.gain.value is not None
    assert row.gain.value > 0.9
    assert (row.gain.base, row.gain.total) == (0, 40)
    assert row.fidelity is not None
    assert row.fidelity.kl < 0.01
    assert row.fidelity.top1 > 0.98
    assert row.comparison is not None
    assert row.comparison.both >= 30
    assert row.bits_per_weight == Artifact.open(math_delta).bits_per_weight


def test_the_base_is_measured_against_the_expert_too(report: Report) -> None:
    row = report.get("base", "math")
    assert row.score is not None
    assert row.score.correct == 0
    assert row.fidelity is not None
    assert row.fidelity.kl > 1


def test_sql_has_fidelity_and_no_accuracy(report: Report) -> None:
    row = report.get("base", "sql")
    assert row.score is None
    assert row.fidelity is not None
    assert row.fidelity.sequences == 8


def test_json_holds_every_outcome_and_can_be_read_back(report: Report) -> None:
    data = json.loads(report.to_json())
    assert (data["n"], data["seed"]) == (40, 6)
    expert, delta = data["rows"][1], data["rows"][2]
    assert expert["score"]["outcomes"].count("1") == expert["score"]["correct"]
    assert len(delta["score"]["outcomes"]) == 40
    assert delta["gain"]["expert"] == expert["score"]["correct"]


def test_markdown_is_one_pipe_table(report: Report) -> None:
    lines = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(report.rows)
    assert {line.count("|") for line in lines} == {9}


def test_the_terminal_table_fits_80_columns_uncut(report: Report) -> None:
    out = StringIO()
    Console(file=out, width=80).print(report.to_table())
    assert "…" not in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_a_row_that_was_not_measured_is_asked_for_in_vain(report: Report) -> None:
    with pytest.raises(KeyError, match="delta 'sql' on 'sql'"):
        report.get("sql", "sql", "delta")


def test_named_tasks_are_asked_of_every_model(family: Path) -> None:
    few = Settings(n=4, fidelity_n=2)
    found = evaluate_family(family / "base", {"math": family / "math"}, tasks=["math", "instruct"], settings=few)
    assert [(row.task, row.model) for row in found.rows] == [
        ("math", "base"),
        ("math", "math"),
        ("instruct", "base"),
        ("instruct", "math"),
    ]


def test_a_delta_of_any_name_is_compared_with_the_only_expert(family: Path, math_delta: Path) -> None:
    few = Settings(n=4, fidelity_n=2)
    found = evaluate_family(family / "base", {"math": family / "math"}, {"four-bit": math_delta}, settings=few)
    assert found.get("four-bit", "math").expert == "math"


def test_a_delta_without_an_expert_still_has_its_accuracy(family: Path, math_delta: Path) -> None:
    found = evaluate_family(family / "base", {}, {"math": math_delta}, settings=Settings(n=20))
    row = found.get("math", "math")
    assert row.score is not None
    assert row.score.accuracy > 0.7
    assert (row.gain, row.fidelity) == (None, None)


def test_what_cannot_be_measured_is_refused_before_any_model_is_loaded(family: Path, tmp_path: Path) -> None:
    two = {"math": family / "math", "code": family / "code"}
    with pytest.raises(ConfigError, match=r"delta 'law': none of the experts.*math, code"):
        evaluate_family(tmp_path, two, {"law": tmp_path})
    with pytest.raises(ConfigError, match="no domain 'law'"):
        evaluate_family(tmp_path, two, tasks=["law"])
    with pytest.raises(ConfigError, match="wizard are no domains"):
        evaluate_family(tmp_path, {"wizard": tmp_path})
    for device in ("toaster", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device: '{device}' cannot be used"):
            evaluate_family(tmp_path, two, settings=Settings(device=device))


def test_what_is_missing_on_disk_is_named_before_any_question_is_asked(family: Path, tmp_path: Path) -> None:
    asked: list[str] = []
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no model.safetensors"):
        evaluate_family(family / "base", {"math": tmp_path}, say=asked.append)
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        evaluate_family(family / "base", {"math": family / "math"}, {"math": tmp_path}, say=asked.append)
    assert asked == []


def test_a_checkpoint_without_a_tokenizer_is_named(family: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(family / "base" / name, tmp_path / name)
    with pytest.raises(ConfigError, match=f"{tmp_path}: has no tokenizer.json"):
        evaluate_family(tmp_path, {}, tasks=["math"])


def test_a_delta_of_another_base_is_refused(family: Path, math_delta: Path) -> None:
    with pytest.raises(IncompatibleError):
        evaluate_family(family / "code", {}, {"math": math_delta}, settings=Settings(n=1))


# -- the command ------------------------------------------------------------------------------------------------


def command(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(evaluate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_measures_a_family_and_says_what_is_missing(family: Path, math_delta: Path, tmp_path: Path) -> None:
    (tmp_path / "family.toml").write_text(
        f'base = {{ path = "{family}/base" }}\n'
        f'[[expert]]\nname = "math"\ndelta = "{math_delta}"\nsource = "{family}/math"\n'
        f'[[expert]]\nname = "sql"\ndelta = "nowhere"\nsource = "{family}/sql"\n'
    )
    out = tmp_path / "results" / "eval.md"
    result = command("--family", tmp_path, "-n", 4, "--seed", 6, "--fidelity-questions", 2, "--json", "--out", out)
    assert result.exit_code == 0, result.output
    assert "sql: no delta yet" in result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [(row["task"], row["model"], row["kind"]) for row in rows if row["kind"] == "delta"] == [
        ("math", "math", "delta")
    ]
    assert out.read_text().startswith("| task | model |")


def test_the_command_takes_names_for_directories(family: Path) -> None:
    result = command(
        "--base",
        family / "base",
        "--expert",
        f"m={family / 'math'}",
        "--tasks",
        "math",
        "-n",
        2,
        "--fidelity-questions",
        2,
    )
    assert result.exit_code == 0, result.output
    assert "expert m: " in result.stderr
    assert "accuracy" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--family or --base"),
        (("--family", "f", "--base", "b"), "--family or --base"),
        (("--family", "f", "--expert", "e"), "a family names its own"),
        (("--base", "b", "--expert", "x/math", "--expert", "y/math"), "'math' is given twice"),
        (("--base", "b", "--out", "table.csv"), ".json or .md"),
        (("--base", "b", "--dtype", "int8"), "float32, bfloat16 or float16"),
    ],
)
def test_the_command_explains_options_that_do_not_fit(arguments: tuple[str, ...], message: str) -> None:
    error = command(*arguments).exception
    assert isinstance(error, ConfigError)
    assert message in str(error)


def test_the_command_is_described_without_loading_torch() -> None:
    code = "import sys, meswitch.cli.eval; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

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
from meswitch.cli.eval import eval_command
from meswitch.errors import ArtifactError, CheckpointError, ConfigError, IncompatibleError
from meswitch.evaluate import Question, Report, Settings, Task, evaluate_family, read_task
from meswitch_lab.toy import task

FEW = Settings(fidelity_n=8, max_new_tokens=56)
FEWER = Settings(fidelity_n=2, max_new_tokens=56)
ANY = Task("any", (Question("?"),))


@pytest.fixture(scope="module")
def report(family: Path, math_delta: Path) -> Report:
    experts = {"math": family / "math", "sql": family / "sql"}
    tasks = [task("math", 40, 6, "math"), task("sql", 8, 6, "sql")]
    return evaluate_family(family / "base", experts, {"math": math_delta}, tasks=tasks, settings=FEW)


def test_an_expert_is_asked_what_is_for_it_and_the_base_everything(report: Report) -> None:
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


def test_questions_without_answers_have_fidelity_and_no_accuracy(report: Report) -> None:
    row = report.get("base", "sql")
    assert row.score is None
    assert row.fidelity is not None
    assert row.fidelity.sequences == 8


def test_json_holds_every_outcome_and_can_be_read_back(report: Report) -> None:
    data = json.loads(report.to_json())
    assert data["limit"] is None
    expert, delta = data["rows"][1], data["rows"][2]
    assert expert["score"]["outcomes"].count("1") == expert["score"]["correct"]
    assert len(delta["score"]["outcomes"]) == delta["score"]["total"] == 40
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


def test_a_task_for_nobody_in_particular_is_asked_of_every_model(family: Path) -> None:
    tasks = [task("math", 4, 2), task("instruct", 4, 2)]
    found = evaluate_family(family / "base", {"any-name": family / "math"}, tasks=tasks, settings=FEWER)
    assert [(row.task, row.model) for row in found.rows] == [
        ("math", "base"),
        ("math", "any-name"),
        ("instruct", "base"),
        ("instruct", "any-name"),
    ]


def test_an_expert_that_no_task_is_for_is_not_loaded(family: Path) -> None:
    said: list[str] = []
    experts = {"math": family / "math", "code": family / "code"}
    found = evaluate_family(
        family / "base", experts, tasks=[task("math", 2, 2, "math")], settings=FEWER, say=said.append
    )
    assert [row.model for row in found.rows] == ["base", "math"]
    assert "expert code: none of the tasks is for it" in said


def test_a_delta_that_no_task_is_for_is_not_loaded(family: Path, math_delta: Path) -> None:
    said: list[str] = []
    found = evaluate_family(
        family / "base",
        {"code": family / "code"},
        {"math": math_delta},
        owners={"math": None},
        tasks=[task("code", 1, 2, "code")],
        settings=FEWER,
        say=said.append,
    )
    assert [row.model for row in found.rows] == ["base", "code"]
    assert "delta math: none of the tasks is for it" in said


def test_a_delta_of_any_name_is_compared_with_the_only_expert(family: Path, math_delta: Path) -> None:
    found = evaluate_family(
        family / "base",
        {"math": family / "math"},
        {"four-bit": math_delta},
        tasks=[task("math", 4, 2)],
        settings=FEWER,
    )
    assert found.get("four-bit", "math").expert == "math"


def test_a_delta_without_an_expert_still_has_its_accuracy(family: Path, math_delta: Path) -> None:
    found = evaluate_family(family / "base", {}, {"math": math_delta}, tasks=[task("math", 20, 2)], settings=FEWER)
    row = found.get("math", "math")
    assert row.score is not None
    assert row.score.accuracy > 0.7
    assert (row.gain, row.fidelity) == (None, None)


def test_texts_are_compared_along_their_whole_length(family: Path, math_delta: Path, tmp_path: Path) -> None:
    words = "Kim has 32 beads. Kim buys 9 bags with 9 beads each. How many beads does Kim have now?"
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": words}) + "\n")
    found = evaluate_family(
        family / "base", {"math": family / "math"}, {"math": math_delta}, tasks=[read_task(tmp_path / "texts.jsonl")]
    )
    base, delta = found.get("base", "texts"), found.get("math", "texts", "delta")
    assert (base.score, delta.score) == (None, None)
    assert base.fidelity is not None
    assert delta.fidelity is not None
    assert delta.fidelity.tokens > 20
    assert delta.fidelity.kl < base.fidelity.kl / 20


def test_what_cannot_be_measured_is_refused_before_any_model_is_loaded(family: Path, tmp_path: Path) -> None:
    two = {"math": family / "math", "code": family / "code"}
    with pytest.raises(ConfigError, match=r"delta 'law': none of the experts.*math, code"):
        evaluate_family(tmp_path, two, {"law": tmp_path}, tasks=[ANY])
    with pytest.raises(ConfigError, match="task any: it is for the expert 'law'; there are math, code"):
        evaluate_family(tmp_path, two, tasks=[Task("any", (Question("?"),), expert="law")])
    with pytest.raises(ConfigError, match="tasks: none"):
        evaluate_family(tmp_path, two, tasks=[])
    with pytest.raises(ConfigError, match="tasks: 'any' is given twice"):
        evaluate_family(tmp_path, two, tasks=[ANY, ANY])
    for device in ("toaster", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device: '{device}' cannot be used"):
            evaluate_family(tmp_path, two, tasks=[ANY], settings=Settings(device=device))


def test_what_is_missing_on_disk_is_named_before_any_question_is_asked(family: Path, tmp_path: Path) -> None:
    asked: list[str] = []
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no model.safetensors"):
        evaluate_family(family / "base", {"math": tmp_path}, tasks=[ANY], say=asked.append)
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        evaluate_family(family / "base", {"math": family / "math"}, {"math": tmp_path}, tasks=[ANY], say=asked.append)
    assert asked == []


def test_a_checkpoint_without_a_tokenizer_is_named(family: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(family / "base" / name, tmp_path / name)
    with pytest.raises(ConfigError, match=f"{tmp_path}: has no tokenizer.json"):
        evaluate_family(tmp_path, {}, tasks=[ANY])


def test_a_delta_of_another_base_is_refused_before_any_question_is_asked(family: Path, math_delta: Path) -> None:
    asked: list[str] = []
    with pytest.raises(IncompatibleError, match="its fingerprint"):
        evaluate_family(family / "code", {}, {"math": math_delta}, tasks=[ANY], say=asked.append)
    assert asked == []


# -- the command ------------------------------------------------------------------------------------------------


def command(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(eval_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of a user who knows nothing of the toy family's tasks."""
    rows = [
        {"question": f"Kim has {10 + i} beads. Kim buys 3 bags with 4 beads each. How many beads does Kim have now?",
         "answer": 22 + i}
        for i in range(12)
    ]  # fmt: skip
    file = tmp_path_factory.mktemp("questions") / "beads.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_an_artifact_of_any_name_is_measured_on_questions_of_ones_own(
    family: Path, math_delta: Path, questions: Path, tmp_path: Path
) -> None:
    expert, out = f"wizard={family / 'math'}", tmp_path / "results" / "eval.md"
    pair = ("--base", family / "base", "--expert", expert)
    asked = ("--questions", questions, "--checker", "number", "--kl-questions", 4, "--max-new-tokens", 56)
    result = command(math_delta, *pair, *asked, "--json", "--out", out)
    assert result.exit_code == 0, result.output
    base, full, delta = json.loads(result.stdout)["rows"]
    assert [(row["task"], row["model"], row["kind"]) for row in (base, full, delta)] == [
        ("beads", "base", "base"),
        ("beads", "wizard", "expert"),
        ("beads", "math", "delta"),
    ]
    assert full["score"]["correct"] > 8
    gain = delta["gain"]
    assert (gain["base"], gain["expert"], gain["total"]) == (base["score"]["correct"], full["score"]["correct"], 12)
    assert gain["value"] == pytest.approx((gain["compressed"] - gain["base"]) / (gain["expert"] - gain["base"]))
    assert gain["interval"][0] <= gain["value"] <= gain["interval"][1]
    assert delta["fidelity"]["sequences"] == 4
    assert out.read_text().startswith("| task | model |")


def test_an_artifact_knows_its_base_only_on_the_hub(math_delta: Path, questions: Path) -> None:
    error = command(math_delta, "--questions", questions, "--checker", "number").exception
    assert isinstance(error, ConfigError)
    assert str(error) == f"--base: {math_delta} was made from a directory; give the base's"


def test_kl_alone_needs_no_answers(family: Path, math_delta: Path, questions: Path) -> None:
    asked = ("--questions", questions, "--checker", "none", "-n", 3, "--max-new-tokens", 56)
    result = command(math_delta, "--base", family / "base", "--expert", family / "math", *asked, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["score"] for row in rows] == [None, None, None]
    assert rows[2]["fidelity"]["sequences"] == 3


def test_a_checker_can_be_a_function_of_ones_own(family: Path, questions: Path, tmp_path: Path) -> None:
    checker = tmp_path / "mine.py"
    checker.write_text("def ends_in_a_number(reply, answer):\n    return reply[-1:].isdigit() and answer > 0\n")
    asked = ("--questions", questions, "--checker", f"{checker}:ends_in_a_number", "-n", 4, "--max-new-tokens", 56)
    result = command("--base", family / "base", "--expert", family / "math", *asked, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"][1]["score"]["correct"] == 4


def test_a_family_says_what_its_experts_are_asked(family: Path, math_delta: Path, tmp_path: Path) -> None:
    (tmp_path / "family.toml").write_text(
        f'base = {{ path = "{family}/base" }}\n'
        f'[[expert]]\nname = "math"\ndelta = "{math_delta}"\nsource = "{family}/math"\n'
        f'questions = "{family}/questions/math.jsonl"\nchecker = "number"\n'
        f'[[expert]]\nname = "code"\ndelta = "nowhere"\nsource = "{family}/code"\n'
        f'questions = "{family}/questions/code.jsonl"\nchecker = "{family}/check_code.py:same_function"\n'
    )
    few = ("-n", 4, "--kl-questions", 2, "--max-new-tokens", 56)
    result = command("--family", tmp_path, *few, "--json")
    assert result.exit_code == 0, result.output
    assert "code: no delta yet" in result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [(row["task"], row["model"], row["kind"]) for row in rows] == [
        ("math", "base", "base"),
        ("math", "math", "expert"),
        ("math", "math", "delta"),
        ("code", "base", "base"),
        ("code", "code", "expert"),
    ]
    assert rows[4]["score"]["correct"] == 4


def test_one_expert_of_a_family_is_measured_alone(family: Path, math_delta: Path, tmp_path: Path) -> None:
    (tmp_path / "family.toml").write_text(
        f'base = {{ path = "{family}/base" }}\n'
        f'[[expert]]\nname = "math"\ndelta = "{math_delta}"\nsource = "{family}/math"\n'
        f'questions = "{family}/questions/math.jsonl"\nchecker = "number"\n'
        '[[expert]]\nname = "code"\ndelta = "nowhere"\nsource = "nowhere either"\nquestions = "none.jsonl"\n'
    )
    few = ("-n", 2, "--kl-questions", 1, "--max-new-tokens", 56)
    result = command("--family", tmp_path, "--expert", "math", "--expert", "math", *few, "--json")
    assert result.exit_code == 0, result.output
    assert "code" not in result.stderr
    rows = [(row["task"], row["model"], row["kind"]) for row in json.loads(result.stdout)["rows"]]
    assert rows == [("math", "base", "base"), ("math", "math", "expert"), ("math", "math", "delta")]
    unknown = command("--family", tmp_path, "--expert", "law").exception
    assert str(unknown) == "no expert 'law'; this family has math, code"


def test_a_delta_without_a_source_is_compared_with_no_other_expert(
    family: Path, math_delta: Path, questions: Path, tmp_path: Path
) -> None:
    (tmp_path / "family.toml").write_text(
        f'base = {{ path = "{family}/base" }}\n'
        f'[[expert]]\nname = "code"\ndelta = "nowhere"\nsource = "{family}/code"\n'
        f'[[expert]]\nname = "law"\ndelta = "{math_delta}"\n'
    )
    asked = ("--questions", questions, "--checker", "number", "-n", 2, "--max-new-tokens", 8)
    result = command("--family", tmp_path, *asked, "--json")
    assert result.exit_code == 0, result.output
    rows = {(row["model"], row["kind"]): row for row in json.loads(result.stdout)["rows"]}
    assert set(rows) == {("base", "base"), ("code", "expert"), ("law", "delta")}
    assert rows["law", "delta"]["expert"] is None


def test_questions_that_are_not_there_are_named_with_the_expert(family: Path, tmp_path: Path) -> None:
    (tmp_path / "family.toml").write_text(
        f'base = {{ path = "{family}/base" }}\n[[expert]]\nname = "law"\ndelta = "nowhere"\nquestions = "none.jsonl"\n'
    )
    result = command("--family", tmp_path)
    assert f"expert 'law': questions: {tmp_path / 'none.jsonl'}: no such file" in str(result.exception)


def test_questions_can_be_for_one_expert_of_several(family: Path) -> None:
    experts = ("--expert", family / "math", "--expert", family / "code")
    asked = ("--questions", f"math={family}/questions/math.jsonl", "--checker", "number", "-n", 2)
    result = command("--base", family / "base", *experts, *asked, "--kl-questions", 1, "--max-new-tokens", 56)
    assert result.exit_code == 0, result.output
    assert "expert code: none of the tasks is for it" in result.stderr
    assert "accuracy" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--base or --family"),
        (("--family", "f", "--base", "b"), "--base or --family"),
        (("artifact", "--family", "f"), "ARTIFACT: artifact: a family names its own; choose by --expert NAME"),
        (("--base", "b", "--expert", "x/math", "--expert", "y/math"), "'math' is given twice"),
        (("--base", "b", "--out", "table.csv"), ".json or .md"),
        (("--base", "b"), "--questions or --tasks: what is asked?"),
        (("--base", "b", "--tasks", "gsm8k", "--checker", "exact"), "give --questions FILE"),
    ],
)
def test_the_command_explains_options_that_do_not_fit(arguments: tuple[str, ...], message: str) -> None:
    error = command(*arguments).exception
    assert isinstance(error, ConfigError)
    assert message in str(error)


def test_a_place_for_the_report_that_cannot_be_is_told_before_any_question_is_asked(
    family: Path, questions: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    asked = ("--questions", questions, "--checker", "number", "--out", tmp_path / "file" / "eval.md")
    result = command("--base", family / "base", *asked)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(f"{tmp_path}/file/eval.md: cannot be written")
    assert result.stderr == ""


def test_the_command_is_described_without_loading_torch() -> None:
    code = "import sys, meswitch.cli.eval; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

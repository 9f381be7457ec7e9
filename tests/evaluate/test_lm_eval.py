"""lm-evaluation-harness on the family, offline: its questions come from this package, its data from local files."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from meswitch.artifact import Artifact
from meswitch.cli import app
from meswitch.compression.merge import load_merged
from meswitch.compression.pipeline import compress
from meswitch.errors import ArtifactError, ConfigError
from meswitch.evaluate import Harness, HarnessSettings, Report, Settings, evaluate_family
from meswitch_lab.toy import accuracy, draw, task

pytest.importorskip("lm_eval", reason="pip install 'meswitch[lm-eval]'")

N, SEED = 24, 6
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(autouse=True, scope="module")
def offline() -> Iterator[None]:
    """The variables are read once, at import, which may have been before."""
    import datasets.config
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def own_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the task `my_math`: a task file and its questions in a JSONL file, as a user would write it."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": question.prompt, "answer": str(question.response).split("#### ")[1]}
        for question in draw("math", N, SEED)
    ]
    (directory / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "my_math.yaml").write_text(f"""
task: my_math
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/math.jsonl}}, cache_dir: {directory}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: 56}}
filter_list:
  - name: strict-match
    filter:
      - {{function: regex, regex_pattern: "#### (-?\\\\d+)"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
""")
    return directory


@pytest.fixture(scope="module")
def compressed(family: Path, math_delta: Path, math_expert: tuple[Any, Any]) -> tuple[Any, Any]:
    return load_merged(family / "base", math_delta), math_expert[1]


@pytest.mark.parametrize("model", ["math_expert", "compressed"])
def test_lm_eval_finds_the_same_answers_right_as_our_own_check(
    model: str, own_task: Path, request: pytest.FixtureRequest
) -> None:
    loaded = request.getfixturevalue(model)
    harness = Harness(["my_math"], HarnessSettings(chat_template=True, include=own_task))
    (measure,) = harness.run(*loaded, batch_size=16)
    ours = accuracy(*loaded, "math", N, SEED)
    assert (measure.task, measure.metric) == ("my_math", "exact_match,strict-match")
    assert measure.outcomes == ours.outcomes
    assert measure.value == pytest.approx(ours.accuracy)
    assert measure.value > 0.8


def test_the_chat_template_is_lm_evals_to_leave_out(math_expert: tuple[Any, Any], own_task: Path) -> None:
    (measure,) = Harness(["my_math"], HarnessSettings(include=own_task)).run(*math_expert, n=8, batch_size=8)
    assert measure.value < 0.5
    assert measure.outcomes is not None
    assert len(measure.outcomes) == 8


def test_the_model_type_meswitch_is_base_and_delta(
    family: Path, math_delta: Path, own_task: Path, compressed: tuple[Any, Any]
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from meswitch.evaluate.lm_eval import register_model_type

    register_model_type()
    found = simple_evaluate(
        model="meswitch",
        model_args=f"base={family / 'base'},delta={math_delta},dtype=float32",
        device="cpu",
        batch_size=16,
        tasks=["my_math"],
        apply_chat_template=True,
        task_manager=TaskManager(include_path=str(own_task), include_defaults=False),
    )
    right = [sample["exact_match"] == 1 for sample in found["samples"]["my_math"]]
    assert tuple(right) == accuracy(*compressed, "math", N, SEED).outcomes
    assert found["config"]["meswitch_bits_per_weight"] == Artifact.open(math_delta).bits_per_weight


def test_what_the_model_type_cannot_do_is_refused(family: Path, math_delta: Path) -> None:
    from meswitch.evaluate.lm_eval import register_model_type

    model = register_model_type()
    base, delta = str(family / "base"), str(math_delta)
    with pytest.raises(ConfigError, match=r"parallelize, peft cannot be used.*max_length"):
        model(base, delta, peft="adapter", parallelize=True)
    with pytest.raises(ConfigError, match="dtype=int8 is none of"):
        model(base, delta, dtype="int8", device="cpu")
    with pytest.raises(ArtifactError, match="full checkpoint"):
        model(base, str(family / "math"))


def test_the_command_line_of_lm_eval_takes_the_model_type_and_the_shipped_task(
    family: Path, math_delta: Path, compressed: tuple[Any, Any], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "meswitch.evaluate.lm_eval", "--model", "meswitch"]
    command += ["--model_args", f"base={family / 'base'},delta={math_delta},dtype=float32", "--apply_chat_template"]
    command += ["--tasks", "family_math", "--include_path", str(family / "lm_eval"), "--device", "cpu"]
    command += ["--batch_size", "16", "--output_path", str(tmp_path / "results.json"), "--limit", str(N)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **OFFLINE})
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("results*.json")
    value = json.loads(results.read_text())["results"]["family_math"]["exact_match,strict-match"]
    assert value == pytest.approx(accuracy(*compressed, "math", N, seed=2).accuracy)


# -- lm-eval's tasks in our own report -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    delta = tmp_path_factory.mktemp("deltas") / "instruct"
    compress(family / "base", family / "instruct", delta)
    few = Settings(limit=N, fidelity_n=4, harness=HarnessSettings(chat_template=True, include=family / "lm_eval"))
    tasks = [task("instruct", N, 2), "family_last_word"]
    return evaluate_family(
        family / "base", {"instruct": family / "instruct"}, {"instruct": delta}, tasks=tasks, settings=few
    )


def test_base_expert_and_delta_are_asked_lm_evals_task_beside_our_own(report: Report) -> None:
    assert [(row.task, row.kind, row.metric) for row in report.rows] == [
        ("instruct", "base", "accuracy"),
        ("instruct", "expert", "accuracy"),
        ("instruct", "delta", "accuracy"),
        ("family_last_word", "base", "acc"),
        ("family_last_word", "expert", "acc"),
        ("family_last_word", "delta", "acc"),
    ]


def test_a_multiple_choice_task_has_its_gain_retained_and_its_paired_test(report: Report) -> None:
    base, row = report.get("base", "family_last_word"), report.get("instruct", "family_last_word", "delta", "acc")
    assert base.value is not None
    assert base.value < 0.5
    assert row.value is not None
    assert row.value > 0.9
    assert row.stderr is not None
    assert row.gain is not None
    assert row.gain.value is not None
    assert row.gain.value > 0.8
    assert row.comparison is not None
    assert row.fidelity is None
    with pytest.raises(KeyError, match="with 'acc_norm'"):
        report.get("instruct", "family_last_word", metric="acc_norm")


def test_json_names_metric_value_and_error_of_every_row(report: Report) -> None:
    rows = json.loads(report.to_json())["rows"]
    assert all({"task", "model", "metric", "value", "stderr"} <= row.keys() for row in rows)
    assert [row["score"]["questions"] for row in rows] == [2, 2, 2, "lm-eval", "lm-eval", "lm-eval"]


def test_the_terminal_table_breaks_long_names_and_cuts_nothing(report: Report) -> None:
    out = StringIO()
    Console(file=out, width=80).print(report.to_table())
    assert "…" not in out.getvalue()
    assert "lm-eval's tasks have no KL" in " ".join(out.getvalue().split())


def test_the_command_asks_lm_evals_tasks(family: Path) -> None:
    options = ["--tasks", "family_last_word", "--include-path", str(family / "lm_eval"), "-n", "4", "--json"]
    result = CliRunner().invoke(app, ["eval", "--base", str(family / "base"), *options])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["task"], row["model"], row["metric"]) == ("family_last_word", "base", "acc")


def test_tasks_that_cannot_be_asked_are_named_before_a_model_is_loaded(family: Path, tmp_path: Path) -> None:
    (tmp_path / "lost.yaml").write_text("task: lost\ndataset_path: nobody/nothing\ntest_split: test\n")
    text = (family / "lm_eval" / "family_math.yaml").read_text()
    (tmp_path / "unsafe.yaml").write_text(text.replace("task: family_math", "task: unsafe\nunsafe_code: true"))
    (tmp_path / "questions.py").write_text((family / "lm_eval" / "questions.py").read_text())
    settings = HarnessSettings(include=tmp_path)
    with pytest.raises(ConfigError, match="lost: lm-eval cannot load it"):
        Harness(["lost"], settings)
    with pytest.raises(ConfigError, match=r"unsafe runs code.*--confirm_run_unsafe_code"):
        Harness(["unsafe"], settings)
    with pytest.raises(ConfigError, match="no such directory"):
        Harness(["lost"], HarnessSettings(include=tmp_path / "nowhere"))

"""The SmolLM2 recipe at the size of the example family: the whole command, and its parts against known values."""

import dataclasses
import importlib
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "smollm2"
BASE = ROOT / "examples" / "family" / "base"
SMALL = {
    "me-switch": {2.2: {"target_bpw": 2.2, "distill": 0, "calibration_tokens": 256}},
    "rtn": {2.2: {"bits": 2, "calibration": None}},
    "bitdelta": {None: {"calibration": None}},
}
OPTIONS = ("--max-steps", "2", "--step-tokens", "512", "--kl-questions", "4", "--device", "cpu", "--workers", "0")
Script = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def script() -> Iterator[Script]:
    """Imports a module of the recipe by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        names = [file.stem for file in RECIPE.glob("*.py")]
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for name in ("math", "instruct"):
        for part, count in (("train", 40), ("dev", 6)):
            rows = [{"q": f"What is {i} and {i + 1}?", "a": f"{2 * i + 1}"} for i in range(count)]
            (directory / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def small(script: Script) -> Iterator[ModuleType]:
    """The command, with methods and answers that take no time."""
    with pytest.MonkeyPatch.context() as patch:
        tasks = script("tasks").TASKS
        patch.setattr(script("methods"), "METHODS", SMALL)
        patch.setitem(tasks, "math", dataclasses.replace(tasks["math"], max_new_tokens=6))
        yield script("run")


@pytest.fixture(scope="module")
def work(small: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run with a served expert."""
    directory = tmp_path_factory.mktemp("work")
    arguments = ["--data", str(data), "--work", str(directory), "--base", str(BASE), "--experts", "math", "instruct"]
    small.main([*arguments, *OPTIONS, "--methods", *SMALL, "--budgets", "2.2", "--served", "2"])
    return directory


def command(work: Path, data: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--work", str(work), "--base", str(BASE), "--experts", "math", *OPTIONS, *more]


@pytest.mark.slow
def test_every_expert_has_a_row_for_each_method(work: Path) -> None:
    found = json.loads((work / "smollm2.json").read_text())
    assert [(row["expert"], row["method"], row["budget"]) for row in found["rows"]] == [
        (expert, method, budget)
        for expert in ("math", "instruct")
        for method, budget in (("me-switch", 2.2), ("rtn", 2.2), ("bitdelta", None))
    ]
    for row in found["rows"]:
        assert 0 < row["kl"] < 1
        assert 0 < row["kl_merged"] < 1
        assert (row["n"], row["lost"] is None) == ((6, False) if row["expert"] == "math" else (None, True))
    ended = {name: about["training"]["ended"] for name, about in found["meta"]["experts"].items()}
    assert [row["training"] for row in found["rows"]] == [ended[row["expert"]] for row in found["rows"]]
    assert {row["scope"] for row in found["rows"]} == {None}  # none of these is trained
    assert found["rows"][0]["bpw"] <= 2.2
    assert found["rows"][0]["kl"] < found["rows"][1]["kl"]  # ours against rounding to nearest
    assert set(found["meta"]["versions"]) == {"torch", "transformers", "meswitch"}
    assert found["meta"]["experts"]["math"]["training"]["steps"] == 2
    assert str(work) not in json.dumps(found)


@pytest.mark.slow
def test_a_row_says_how_the_artifact_was_trained_and_what_was_told(
    small: ModuleType, work: Path, data: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meswitch.compression.pipeline.scope_for", lambda expert, device: ("block", "too little free"))
    monkeypatch.setattr(script("methods"), "METHODS", {"rtn": {1.3: {"bits": 1, "distill": 1}}})
    out = ("--out", str(work / "trained.json"))
    [row] = small.main(command(work, data, "--methods", "rtn", "--budgets", "1.3", *out))["rows"]
    assert row["scope"] == "block"
    assert row["held_out_after"] <= row["held_out_before"]
    assert row["notices"][-1] == "too little free"


def test_served_answers_are_those_of_the_merged_model(work: Path) -> None:
    served = json.loads((work / "smollm2.json").read_text())["meta"]["served"]
    expected = {"expert": "math", "method": "me-switch", "budget": 2.2, "questions": 2, "equal": 2}
    assert served == [expected]


def test_what_is_done_is_not_done_again(small: ModuleType, work: Path, data: Path, script: Script) -> None:
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*.json") if file.parent != work}
    (work / "rows" / "math" / "rtn-2.2.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script("jobs"), "train", None)
        found = small.main(command(work, data, "--methods", "rtn", "bitdelta", "--budgets", "2.2"))
    assert len(found["rows"]) == 6  # the other expert's and methods' stay
    changed = [file for file, time in before.items() if file.stat().st_mtime_ns != time]
    assert changed == [work / "rows" / "math" / "rtn-2.2.json"]


def test_another_recipe_or_other_questions_are_refused(small: ModuleType, work: Path, data: Path) -> None:
    with pytest.raises(SystemExit, match="another base or recipe"):
        small.main(command(work, data, "--max-steps", "3"))
    with pytest.raises(SystemExit, match="has results of questions None, not 4; choose another --out"):
        small.main(command(work, data, "--questions", "4"))
    with pytest.raises(SystemExit, match=r"sql\.train\.jsonl: no such file"):
        small.main(command(work, data, "--experts", "sql"))


def test_a_failed_job_is_told_and_stops_no_other(
    small: ModuleType, work: Path, data: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = {2.2: {"target_bpw": 0.1, "distill": 0, "calibration_tokens": 64}}
    monkeypatch.setattr(script("methods"), "METHODS", {"me-switch": impossible, "rtn": SMALL["rtn"]})
    (work / "rows" / "math" / "rtn-2.2.json").unlink()
    with pytest.raises(SystemExit, match=r"measure math me-switch 2\.2: ConfigError: target_bpw: 0\.1"):
        small.main(command(work, data, "--methods", "me-switch", "rtn", "--budgets", "2.2"))
    assert (work / "rows" / "math" / "rtn-2.2.json").is_file()


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("48/2 = 24. The answer is 24.", "24.0", True),
        ("The answer is 1,024", "1024", True),
        ("it is -3 or 4", "-3", False),
        ("no number", "0", False),
    ],
)
def test_of_a_word_problem_the_last_number_counts(script: Script, answer: str, wanted: str, right: bool) -> None:
    assert script("tasks").same_number(answer, wanted) is right


def test_a_query_is_equal_after_folding_white_space(script: Script) -> None:
    same = script("tasks").same_text
    assert same("SELECT  A\nFROM B ;\n", "SELECT A FROM B ;")
    assert not same("SELECT A FROM C ;", "SELECT A FROM B ;")


def test_questions_are_spread_over_the_file(script: Script) -> None:
    spread = script("tasks").spread
    assert spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert spread([1, 2], 5) == spread([1, 2], None) == [1, 2]


def test_right_answers_are_compared_by_question(script: Script) -> None:
    # 8 lost and 1 won: 2 (1 + 9) / 2^9; of a gain of 60 points 53 are left
    full, base = "1" * 80 + "0" * 20, "1" * 20 + "0" * 80
    row = script("score").compared("math", "1" * 72 + "0" * 8 + "1" + "0" * 19, full, base)
    assert (row["n"], row["lost"], row["won"]) == (100, 8, 1)
    assert row["p"] == pytest.approx(20 / 512)
    assert row["gain"] == pytest.approx(53 / 60)
    # the interval of a ratio of means by the delta method, which a bootstrap comes near
    residuals = [0] * 20 + [1 - 53 / 60] * 52 + [-53 / 60] * 8 + [1] + [0] * 19
    error = math.sqrt(sum(one**2 for one in residuals)) / 60
    assert row["gain_low"] == pytest.approx(53 / 60 - 1.96 * error, abs=0.02)
    assert row["gain_high"] == pytest.approx(53 / 60 + 1.96 * error, abs=0.02)
    assert set(script("score").compared("instruct", None, None, None).values()) == {None}


def test_an_epoch_has_every_row_once_in_batches_that_fit(script: Script) -> None:
    train = script("train")
    rng = random.Random(0)
    lengths = [rng.randint(5, 200) for _ in range(3000)]
    batches = train.batches(lengths, 1000, random.Random(0))
    assert sorted(i for batch in batches for i in batch) == list(range(3000))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 1000 for batch in batches)
    plan = train.plan(lengths, train.Recipe(1.5, 1e-4, step_tokens=1000))
    assert len(batches) * 1.4 < len(plan) < len(batches) * 1.6


def test_the_loss_counts_answers_only_and_parts_add_up(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    train = script("train")
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    batch = [train.Example([5, 6, 7], [8, 9]), train.Example([5, 6], [10, 11, 12])]
    expected = []
    for prompt, answer in batch:
        ids = torch.tensor([prompt + answer])
        found = model(ids).logits[0].log_softmax(-1)
        expected += [-found[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
    whole = train.backward(model, batch, 0, "cpu")
    gradient = model.lm_head.weight.grad.clone()
    assert whole.item() == pytest.approx(sum(expected) / 5, abs=1e-5)
    model.zero_grad()
    monkeypatch.setattr(train, "PART_TOKENS", 1)
    assert train.backward(model, batch, 0, "cpu").item() == pytest.approx(whole.item(), abs=1e-5)
    assert torch.allclose(model.lm_head.weight.grad, gradient, atol=1e-6)


def test_rows_of_a_gguf_head_are_put_in_halves(script: Script) -> None:
    base = script("base")
    weight = torch.tensor([[0], [2], [1], [3], [10], [12], [11], [13]])  # pairs 0 2, 1 3 of two heads, side by side
    assert base.split_halves(weight, 2).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert base.checkpoint_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert base.checkpoint_name("token_embd.weight") == "model.embed_tokens.weight"


def test_every_method_has_options_that_compress_knows(script: Script) -> None:
    methods = importlib.reload(script("methods"))
    for method, settings in methods.METHODS.items():
        for budget in settings:
            assert methods.options(method, budget, "text.jsonl").method in method

"""plan: the bytes that inspect will show, and what fits."""

import json
from pathlib import Path

import pytest

from meswitch.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples/mistral-7b/configs"


def test_plan_says_before_what_inspect_says_after(cli, pair, tmp_path):
    base, expert = pair(added_tokens=2, change=0.5)  # enough to move every norm
    planned = cli.json("plan", "--base", base / "config.json", "--expert", expert / "config.json")
    cli.ok("compress", "--base", base, "--expert", expert, "--out", tmp_path / "delta")
    seen = cli.json("inspect", tmp_path / "delta")
    for part in ("by_content", "by_layer", "tensors"):
        assert planned["bytes"][part] == seen["bytes"][part]
    for field in ("parameters", "bytes", "dtype", "vocab_size"):
        assert planned["expert"][field] == seen["expert"][field]
    assert planned["bits_per_weight"] == seen["bits_per_weight"]["tensors"]
    assert planned["ratio"] == seen["ratio"]["tensors"]
    assert sum(sum(role.values()) for role in planned["bytes"]["by_role"].values()) == planned["bytes"]["tensors"]


@pytest.mark.parametrize(("backend", "kernel"), [("auto", True), ("triton", True), ("cpu", False)])
def test_the_slot_is_the_one_that_the_store_reserves(cli, family, math_delta, backend, kernel):
    import torch

    from meswitch import Artifact
    from meswitch.slots import ExpertStore

    store = ExpertStore({"math": Artifact.open(math_delta)}, device=torch.device("cpu"), slots=1, kernel=kernel)
    found = cli.json(
        "plan", "--base", family / "base", "--expert", family / "math", "--kv-tokens", 0, "--backend", backend
    )
    assert found["memory"]["slot"] == store.slot_bytes


def test_a_7b_expert_has_the_bytes_that_were_measured(cli):
    measured = json.loads((ROOT / "benchmarks/results/compress-memory-7b.json").read_text())
    found = cli.json("plan", "--base", CONFIGS / "mistral-7b/base", "--group-size", 64)
    assert found["bytes"]["tensors"] / 1e9 == measured["artifact_gb"]
    assert found["expert"]["bytes"] / 1e9 == measured["checkpoint_gb"]
    assert found["bits_per_weight"] == measured["bits_per_weight"]


def test_added_tokens_cost_their_rows_twice(cli):
    base = CONFIGS / "mistral-7b/base"
    found = cli.json("plan", "--base", base, "--vocab-size", 32002)
    assert found == cli.json("plan", "--base", base, "--expert", CONFIGS / "mistral-7b/dolphin") | {
        "expert": found["expert"]
    }
    assert found["bytes"]["by_content"]["added rows"] == 2 * 2 * 4096 * 2  # tokens, matrices, hidden size, bf16


def test_an_expert_of_a_quantised_base_is_planned_as_over_the_weights_that_are_read(cli, family, tmp_path):
    cli.ok("quantize", "--base", family / "base", "--to", "int4", "--out", tmp_path / "int4")
    plain = cli.json("plan", "--base", family / "base")
    for base in (tmp_path / "int4", tmp_path / "int4/config.json"):
        assert cli.json("plan", "--base", base)["bytes"] == plain["bytes"]
        assert cli.json("plan", "--base", base, "--backend", "cpu")["memory"]["base"] == plain["memory"]["base"]


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_a_quantised_base_is_planned_as_the_engine_holds_it_on_a_gpu(cli, family, tmp_path, kind):
    cli.ok("quantize", "--base", family / "base", "--to", kind, "--out", tmp_path / kind)
    plain = cli.json("plan", "--base", family / "base")["memory"]
    tensors = Checkpoint.open(family / "base").tensors
    shapes = [info.shape for name, info in tensors.items() if name.endswith("_proj.weight")]
    held = sum(
        # of 4 bits a group has 128 channels, which is a whole row of most layers: those take a byte a code
        rows * width // 2 + 4 * rows * width // 128 if kind == "int4" and width > 128 else rows * width + 4 * rows
        for rows, width in shapes
    )
    for base in (tmp_path / kind, tmp_path / kind / "config.json"):
        found = cli.json("plan", "--base", base)["memory"]
        assert found["base"] == plain["base"] - sum(2 * rows * width for rows, width in shapes) + held
        assert found["scratch"] == 2 * max(rows * width for rows, width in shapes)
        assert found["compressed"] == found["base"] + found["scratch"] + found["slot"] + found["kv_cache"]
        assert "to restore its layers" in cli.ok("plan", "--base", base).stdout


def test_options_change_the_plan_as_they_change_the_artifact(cli):
    base = CONFIGS / "mistral-7b/base"
    plain = cli.json("plan", "--base", base)["bytes"]
    exact = cli.json("plan", "--base", base, "--embeddings", "exact", "--group-size", "row", "--bits", 1)["bytes"]
    assert exact["by_role"]["head"] == {"exact tensors": 32000 * 4096 * 2}
    assert exact["by_role"]["linear"]["codes"] == plain["by_role"]["linear"]["codes"] / 2
    assert "salient channels" not in cli.json("plan", "--base", base, "--salient", 0)["bytes"]["by_content"]


def test_what_fits_in_a_device(cli):
    command = ("plan", "--base", CONFIGS / "mistral-7b/base", "--experts", 16)
    found = cli.json(*command, "--memory", 80)["memory"]
    assert found["limit"] == 80 * 10**9
    assert found["compressed"] == found["base"] + 16 * found["slot"] + found["kv_cache"]
    room = found["limit"] - found["base"] - found["kv_cache"]
    assert found["experts_that_fit"] == room // found["slot"] >= 16  # the paper serves 16 of them on 80 GB
    assert found["full_models_that_fit"] == 5
    assert cli.json(*command, "--memory", "24GiB")["memory"]["limit"] == 24 * 2**30
    shown = cli.ok(*command, "--memory", 80).stdout
    assert f"the base and {found['experts_that_fit']} experts; or 5 full models" in " ".join(shown.split())
    assert "not even the base" in cli.ok(*command, "--memory", 10).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "much"), "--memory: 'much"),
        (("--group-size", "few"), "--group-size: 'few' is neither a number nor `row`"),
        (("--group-size", "4"), "group_size must be at least 8"),
        (
            ("--expert", CONFIGS / "llama-2-13b/math"),
            "model_type: the expert has 'llama', the base 'mistral'",
        ),
        (("--expert", "./nowhere"), "./nowhere: no such file or directory; give a config.json"),
    ],
)
def test_what_cannot_be_planned_is_one_line(cli, arguments, message):
    assert message in cli.error("plan", "--base", CONFIGS / "mistral-7b/base", *arguments)

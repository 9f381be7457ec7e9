"""compress, inspect, verify, merge: one artifact's way through the commands."""

import json
import shutil

import pytest
import torch

from meswitch import Artifact
from meswitch.checkpoint import Checkpoint
from meswitch.tensorfile import read_header


def files_size(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_compress_inspect_verify_merge_round_trip(cli, family, tmp_path):
    out, merged = tmp_path / "math", tmp_path / "merged"
    options = ("--bits", 3, "--group-size", 32, "--salient", 2, "--calibration-tokens", 600)
    text = family / "calibration/math.jsonl"
    made = cli.json(
        "compress",
        "--base",
        family / "base",
        "--expert",
        family / "math",
        "--out",
        out,
        "--calibration",
        text,
        *options,
    )
    assert made["expert"] == "math"
    assert made["skipped"] is False
    assert made["full_bytes"] == Checkpoint.open(family / "math").nbytes
    assert made["ratio"] == pytest.approx(made["full_bytes"] / made["tensor_bytes"])

    seen = cli.json("inspect", out)
    assert seen["bytes"]["tensors"] == made["tensor_bytes"]
    assert seen["bytes"]["total"] == made["disk_bytes"] == files_size(out)
    assert seen["bits_per_weight"]["tensors"] == pytest.approx(made["bits_per_weight"])
    method = seen["method"]
    assert (method["bits"], method["group_size"], method["salient"]) == (3, 32, 2)
    assert method["calibration"]["source"] == "math.jsonl"
    assert method["calibration"]["tokens"] == 600

    checked = cli.json("verify", out, "--base", family / "base")
    assert checked["ok"] is True
    assert checked["tensors"] == checked["base"]["tensors"] == 57
    assert checked["tensor_bytes"] == made["tensor_bytes"]

    written = cli.json("merge", "--base", family / "base", "--delta", out, "--out", merged)
    assert written["tensor_bytes"] == made["full_bytes"]
    base, expert, back = (Checkpoint.open(path) for path in (family / "base", family / "math", merged))
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        ours, theirs, restored = (c.read(name).float() for c in (base, expert, back))
        assert (restored - theirs).norm() < 0.3 * (ours - theirs).norm()


def test_the_tables_say_the_same_as_json(cli, family, math_delta):
    text = cli.ok("inspect", math_delta).stdout
    seen = cli.json("inspect", math_delta)
    for number in (seen["bytes"]["total"], seen["bytes"]["tensors"], *seen["bytes"]["by_content"].values()):
        assert f"{number:,}" in text
    assert seen["base"]["fingerprint"] in text
    assert "none (data-free)" in text
    lines = cli.ok("verify", math_delta, "--base", family / "base").stdout.splitlines()
    assert lines[0] == f"{math_delta}: all is as it was written"
    assert lines[-1] == f"  base         57 SHA-256 sums of {family / 'base'}, and its fingerprint"


def test_inspect_adds_up_to_the_directory_whatever_lies_in_it(cli, math_delta, tmp_path):
    copy = tmp_path / "math"
    shutil.copytree(math_delta, copy)
    (copy / "NOTES.md").write_text("mine")
    (copy / ".cache").mkdir()
    (copy / ".cache/x").write_bytes(b"123")
    found = cli.json("inspect", copy)["bytes"]
    assert found["other"]["NOTES.md"] == 4
    assert found["other"][".cache/x"] == 3
    assert found["tensors"] + sum(found["other"].values()) == found["total"] == files_size(copy)
    assert sum(found["by_content"].values()) == found["tensors"]
    assert sum(row["bytes"] for row in found["by_layer"]) == found["tensors"]
    stored = sum(info.nbytes for info in read_header(copy / "delta.safetensors").values())
    assert stored == found["tensors"]
    assert found["other"]["safetensors headers"] == (copy / "delta.safetensors").stat().st_size - stored


def test_compress_without_options_is_two_bits_and_data_free(cli, family, tmp_path):
    cli.ok("compress", "--base", family / "base", "--expert", family / "sql", "--out", tmp_path / "sql")
    method = Artifact.open(tmp_path / "sql").manifest.method
    assert (method.bits, method.group_size, method.salient, method.embeddings) == (2, 128, None, "quantised")
    assert method.calibration is None


def test_rows_as_groups_and_exact_embeddings(cli, family, tmp_path):
    options = ("--group-size", "row", "--embeddings", "exact", "--calibration", "none")
    cli.ok("compress", "--base", family / "base", "--expert", family / "sql", "--out", tmp_path / "sql", *options)
    manifest = Artifact.open(tmp_path / "sql").manifest
    assert manifest.method.group_size is None
    assert manifest.tensors["lm_head.weight"].kind == "dense"


def test_verify_finds_a_flipped_bit_and_names_file_and_tensor(cli, math_delta, tmp_path):
    copy = tmp_path / "math"
    shutil.copytree(math_delta, copy)
    name = "model.layers.3.mlp.down_proj.weight_packed"
    info = read_header(copy / "delta.safetensors")[name]
    with (copy / "delta.safetensors").open("r+b") as file:
        file.seek(info.offset + info.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0b100]))
    line = cli.error("verify", copy)
    assert line.startswith(f"{copy / 'delta.safetensors'}: {name}: checksum differs")
    assert "compress again" in line


def test_verify_finds_a_changed_tokenizer(cli, math_delta, tmp_path):
    copy = tmp_path / "math"
    shutil.copytree(math_delta, copy)
    (copy / "chat_template.jinja").write_text("{{ other }}")
    assert cli.error("verify", copy, "--json").startswith(f"{copy / 'chat_template.jinja'}: differs")


def test_verify_names_the_first_tensor_of_another_base(cli, family, math_delta):
    line = cli.error("verify", math_delta, "--base", family / "code")
    assert "lm_head.weight is not the tensor" in line


def test_merge_in_another_dtype(cli, family, math_delta, tmp_path):
    out = tmp_path / "merged"
    result = cli.ok("merge", "--base", family / "base", "--delta", math_delta, "--out", out, "--dtype", "float32")
    assert result.stdout.startswith(f"{out}: 57 tensors, 8 MB")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert Checkpoint.open(out).read("model.norm.weight").dtype == torch.float32


def test_an_exact_artifact_is_made_inspected_verified_and_merged(cli, family, tmp_path):
    base, expert, out = family / "base", family / "math", tmp_path / "delta"
    row = cli.json("compress", "--base", base, "--expert", expert, "--out", out, "--bits", "exact")
    seen = cli.json("inspect", out)
    assert seen["method"]["name"] == "exact"
    assert seen["bytes"]["by_content"]["exact changes"] > 0.9 * row["tensor_bytes"]
    assert seen["tensors"]["exact"] > 0
    assert "exact: merged, the fine-tune's tensors bit for bit" in cli.ok("inspect", out).stdout
    cli.ok("verify", out, "--base", base)
    cli.ok("merge", "--base", base, "--delta", out, "--out", tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").stat().st_size == (expert / "model.safetensors").stat().st_size
    planned = cli.json("plan", "--base", base, "--expert", expert, "--bits", "exact")
    assert planned["bytes"]["tensors"] >= row["tensor_bytes"]
    assert "An upper bound: only the weights can tell" in cli.ok("plan", "--base", base, "--bits", "exact").stdout

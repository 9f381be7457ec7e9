"""A PEFT adapter's directory in place of an artifact, or of a full fine-tune."""

import pytest
import torch
from safetensors.torch import load_file

from meswitch import Artifact
from meswitch.compression.merge import load_merged
from tests.support.adapters import pairs, write_adapter

TARGETS = ("q_proj", "v_proj", "lm_head")


@pytest.fixture
def adapter(family, tmp_path):
    tensors = pairs(family / "base", *TARGETS, size=0.2)
    return write_adapter(tmp_path / "poet", tensors, target_modules=list(TARGETS))


def test_compress_keeps_it_as_it_was_trained_and_plan_knew_its_bytes(cli, family, adapter, tmp_path):
    planned = cli.json("plan", "--base", family / "base", "--expert", adapter, "--backend", "reference")
    made = cli.json("compress", "--base", family / "base", "--expert", adapter, "--out", tmp_path / "delta")
    stored = sum(tensor.nbytes for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert made["tensor_bytes"] == planned["bytes"]["tensors"] == stored
    found = cli.json("inspect", tmp_path / "delta")
    assert found["tensors"] == {"packed": 0, "coded": 0, "lowrank": 13, "exact": 0, "dense": 0, "same": 44}
    assert found["method"]["parameters"] == {"r": 4.0, "lora_alpha": 8.0}
    assert found["bytes"]["by_content"] == planned["bytes"]["by_content"] == {"low-rank pairs": stored}
    assert cli.json("verify", tmp_path / "delta", "--base", family / "base")["base"]["tensors"] == 57
    assert "a PEFT adapter, kept as it was trained: r 4, lora_alpha 8" in cli.ok("inspect", tmp_path / "delta").stdout


@pytest.mark.parametrize("option", [("--bits", 3), ("--bits", 2), ("--calibration", "self"), ("--distill", 0)])
def test_options_without_effect_on_it_are_refused(cli, family, adapter, tmp_path, option):
    error = cli.error("compress", "--base", family / "base", "--expert", adapter, "--out", tmp_path / "x", *option)
    assert "is a PEFT adapter, which is kept as it was trained; leave it out" in error
    assert not (tmp_path / "x").exists()


def test_inspect_and_verify_take_it_where_its_base_is_known(cli, family, adapter):
    assert "of some/base, which is no directory here; say where its base is" in cli.error("inspect", adapter)
    found = cli.json("inspect", adapter, "--base", family / "base")
    assert found["artifact"] == str(adapter)
    assert found["tensors"]["lowrank"] == 13
    assert "an adapter has no checksums" in cli.ok("verify", adapter).stdout
    assert cli.json("verify", adapter, "--base", family / "base")["base"] == {"source": str(family / "base")}


def test_merge_and_diff_take_it(cli, family, adapter, tmp_path):
    cli.ok("merge", "--base", family / "base", "--delta", adapter, "--out", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, value in load_merged(family / "base", adapter, torch.bfloat16).state_dict().items():
        assert torch.equal(merged[name], value), name
    found = cli.json("diff", "--base", family / "base", "--expert", adapter)
    moved = {item["name"] for item in found["tensors"] if item["delta_norm"] > 0}
    assert moved == {name for name in merged if name.removesuffix(".weight").endswith(TARGETS)}
    assert found["obstacle"] is None
    assert found["tokenizer"]["chat_template"] == "same"


def write_family(file, family, *expert):
    lines = [f'[base]\npath = "{family}/base"', "[compress]\nbits = 3", "[engine]\nkv_cache_tokens = 4096"]
    file.write_text("\n".join([*lines, '[[expert]]\nname = "poet"', *expert]))
    return file


def test_a_family_serves_it_as_delta_and_compresses_it_as_source(cli, family, adapter, tmp_path):
    file = write_family(tmp_path / "family.toml", family, f'delta = "{adapter}"')
    kept = cli.ok("compress", "--family", file, "--overwrite")
    assert "is a PEFT adapter and served as it is: there is nothing to compress" in kept.stderr
    asked = ("generate", "--family", file, "--model", "poet", "--max-tokens", 4, "Tom has 3")
    text = cli.json(*asked)["text"]
    write_family(file, family, f'delta = "{tmp_path}/made"', f'source = "{adapter}"')
    cli.ok("compress", "--family", file)
    assert Artifact.open(tmp_path / "made").manifest.method.name == "lora"
    assert f"{tmp_path}/made is kept; --overwrite makes it anew" in cli.ok("compress", "--family", file).stderr
    assert cli.json(*asked)["text"] == text


def test_extract_lora_says_what_is_kept_and_what_is_left_out(cli, family, tmp_path):
    pair = ("--base", family / "base", "--expert", family / "math")
    found = cli.json("extract-lora", *pair, "--rank", 8, "--out", tmp_path / "math")
    assert found["rank"] == 8
    assert found["bytes"] < found["full_bytes"]
    assert 0 < found["all"]["share"] < found["linear_layers"]["share"] < 1
    assert found["all"]["energy"] == pytest.approx(sum(row["energy"] for row in found["by_type"]))
    assert {row["how"] for row in found["by_type"]} == {"pair", "left out"}
    more = cli.json("extract-lora", *pair, "--rank", 32, "--out", tmp_path / "math", "--overwrite")
    assert more["linear_layers"]["share"] > found["linear_layers"]["share"]
    shown = cli.ok("extract-lora", *pair, "--rank", 8, "--out", tmp_path / "again")
    assert "left out, as a LoRA has no place for them: model.embed_tokens.weight" in shown.stdout
    whole = cli.ok("extract-lora", *pair, "--rank", 8, "--out", tmp_path / "whole", "--modules-to-save")
    assert "left out" not in whole.stdout
    for name in ("math", "whole"):
        cli.ok("verify", tmp_path / name, "--base", family / "base")
        cli.ok("generate", "--family", _family(tmp_path, family, name), "--model", "math", "--max-tokens", 4, "2 + 2 =")


def _family(room, family, name):
    file = room / f"{name}.toml"
    lines = [f'[base]\npath = "{family}/base"', f'[[expert]]\nname = "math"\ndelta = "{room}/{name}"']
    file.write_text("\n".join([*lines, "[engine]\nkv_cache_tokens = 4096"]))
    return file

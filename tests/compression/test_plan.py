"""A plan has the bytes of the artifact that compress writes, from shapes alone."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

import meswitch
from meswitch.artifact import Artifact, account
from meswitch.checkpoint import Checkpoint
from meswitch.compression.options import Options
from meswitch.compression.plan import Memory, kv_bytes, outline, predict
from meswitch.errors import CheckpointError, ConfigError, IncompatibleError
from meswitch.slots.layout import Layout
from tests.support.models import edit_config

WEIGHTS = "model.safetensors"
SETTINGS = {
    "default": {},
    "one bit, a scale a row": {"bits": 1, "group_size": None},
    "three bits, small groups, four channels": {"bits": 3, "group_size": 32, "salient": 4},
    "groups that do not divide the row, no channel": {"bits": 4, "group_size": 48, "salient": 0},
    "whole embeddings": {"embeddings": "exact"},
}


def stored(artifact: Artifact):
    """Everything that costs bytes: tensor -> kind, role and its parts' dtypes, shapes and bytes."""
    return {
        name: (entry.kind, entry.role, {s: (p.dtype, p.shape, p.bytes) for s, p in entry.stored.items()})
        for name, entry in artifact.manifest.tensors.items()
    }


def changed(artifact: Artifact):
    """What only weights can tell: how many rows of each tensor changed, where that is not all of them."""
    tensors = artifact.manifest.tensors.items()
    live = {name: e.stored["row_index"].shape[0] for name, e in tensors if "row_index" in e.stored}
    return live | {name: 0 for name, entry in tensors if entry.kind == "same"}


def only_config(directory, to):
    to.mkdir()
    shutil.copyfile(directory / "config.json", to / "config.json")
    return to


@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_from_two_configurations_is_byte_for_byte_the_artifact(family, tmp_path, name):
    made = meswitch.compress(family / "base", family / "math", tmp_path / "math", **SETTINGS[name])
    base, expert = (outline(family / side / "config.json") for side in ("base", "math"))
    planned = predict(base, expert, Options(**SETTINGS[name]), changed_rows=changed(made))
    assert stored(planned) == stored(made)
    assert (planned.nbytes, planned.bits_per_weight) == (made.nbytes, made.bits_per_weight)
    assert account(planned) == account(made)
    assert Layout.of(planned).nbytes == Layout.of(made).nbytes
    assert dataclasses.replace(planned.manifest.expert, name="") == dataclasses.replace(made.manifest.expert, name="")


@pytest.mark.parametrize("case", [{"added_tokens": 2}, {"added_tokens": 3, "tied": True}])
@pytest.mark.parametrize("arch", ["mistral", "qwen2"])
def test_added_tokens_and_tied_heads_are_planned(pair, tmp_path, arch, case):
    base, expert = pair(arch, **case)
    made = meswitch.compress(base, expert, tmp_path / "delta")
    assert stored(predict(outline(base), outline(expert), changed_rows=changed(made))) == stored(made)
    size = 2048 + case["added_tokens"]
    from_base_alone = predict(outline(base), outline(base / "config.json", vocab_size=size), changed_rows=changed(made))
    assert stored(from_base_alone) == stored(made)


def test_what_equals_the_base_is_all_that_a_plan_overstates(pair, tmp_path):
    base, expert = pair()
    ours, theirs = (load_file(side / "model.safetensors") for side in (base, expert))
    kept = {"model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"}
    theirs |= {name: ours[name] for name in kept}
    theirs["model.embed_tokens.weight"][100:1900] = ours["model.embed_tokens.weight"][100:1900]
    save_file(theirs, expert / "model.safetensors", metadata={"format": "pt"})
    made = meswitch.compress(base, expert, tmp_path / "delta")
    known = changed(made)
    assert known == dict.fromkeys(kept, 0) | {"model.embed_tokens.weight": 248}
    planned = predict(outline(base), outline(expert))
    rest = {name: parts for name, parts in stored(made).items() if name not in known}
    assert {name: parts for name, parts in stored(planned).items() if name not in known} == rest
    assert planned.nbytes > made.nbytes
    assert stored(predict(outline(base), outline(expert), changed_rows=known)) == stored(made)


def test_a_configuration_lays_out_what_the_checkpoint_holds(pair, tmp_path):
    for arch in ("llama", "mistral", "qwen2", "qwen3"):
        _, expert = pair(arch, tied=arch == "qwen3")
        found = outline(only_config(expert, tmp_path / arch))
        checkpoint = Checkpoint.open(expert)
        assert shapes(found) == shapes(checkpoint)
        assert found.loaded.aliases == checkpoint.loaded.aliases


def test_a_quantised_checkpoint_is_laid_out_as_it_was_before(pair):
    base, expert = pair()
    wanted = shapes(outline(base))
    edit_config(base, quantization_config={"quant_method": "gptq", "bits": 4})
    packed = {name.replace(".weight", ".qweight"): t.to(torch.int32) for name, t in load_file(base / WEIGHTS).items()}
    save_file(packed, base / WEIGHTS)
    assert shapes(outline(base, unquantised=True)) == wanted
    assert shapes(outline(base)) != wanted
    assert not outline(expert, unquantised=True).is_quantised


def shapes(checkpoint):
    return {name: (info.shape, info.dtype, info.nbytes) for name, info in checkpoint.tensors.items()}


def test_experts_of_a_mixture_are_laid_out_one_by_one_as_they_are_stored(tmp_path):
    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1, num_local_experts=4, vocab_size=64)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixtral")
    found = outline(only_config(tmp_path / "mixtral", tmp_path / "config"))
    assert shapes(found) == shapes(Checkpoint.open(tmp_path / "mixtral"))


def test_what_fits_is_the_most_that_stays_within_the_limit():
    memory = Memory(base=100, slot=7, full=100, kv=5, experts=3, limit=150)
    assert (memory.compressed, memory.full_models) == (126, 305)
    assert (memory.experts_that_fit, memory.full_models_that_fit) == (6, 1)
    assert dataclasses.replace(memory, experts=6).compressed <= 150 < dataclasses.replace(memory, experts=7).compressed
    assert dataclasses.replace(memory, limit=50).experts_that_fit == 0
    assert dataclasses.replace(memory, limit=None).experts_that_fit is None


def test_keys_and_values_are_those_of_the_key_value_heads(family):
    config = json.loads((family / "base/config.json").read_text())
    wanted = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2
    assert kv_bytes(outline(family / "base"), 10) == 10 * wanted


def test_a_plan_is_refused_where_compress_would_refuse(pair, tmp_path):
    base, _ = pair()
    fields = json.loads((base / "config.json").read_text())
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide/config.json").write_text(json.dumps(fields | {"intermediate_size": 320}))
    with pytest.raises(IncompatibleError, match="intermediate_size"):
        predict(outline(base), outline(tmp_path / "wide"))
    with pytest.raises(ConfigError, match="bitdelta"):
        predict(outline(base), outline(base), Options(method="bitdelta"))
    with pytest.raises(ConfigError, match="target_bpw"):
        predict(outline(base), outline(base), Options(target_bpw=2.0))


def test_what_cannot_be_laid_out_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no .* \(it holds nothing\)"):
        outline(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        outline(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(CheckpointError, match="model_type: 'no-such-model' is none that"):
        outline(tmp_path)


def test_a_vocabulary_needs_a_token(family):
    with pytest.raises(ConfigError, match="vocab_size: 0"):
        outline(family / "base", vocab_size=0)

"""An adapter becomes an artifact without being rounded: base + artifact is what PEFT merges."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, MixtralConfig

import meswitch
from meswitch.adapter import Adapter, open_expert, write_artifact
from meswitch.artifact import Artifact, account
from meswitch.checkpoint import Checkpoint
from meswitch.compression.merge import load_merged, merged_tensors
from meswitch.errors import ArtifactError, CheckpointError, IncompatibleError
from tests.support.adapters import pairs, product, write_adapter
from tests.support.models import TINY, edit_config

FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
Q0 = "model.layers.0.self_attn.q_proj"


def converted(base, adapter, out, **options):
    return write_artifact(Checkpoint.open(base), Adapter.open(adapter), out, **options)


def restored(base, artifact):
    return dict(merged_tensors(Checkpoint.open(base), artifact, torch.float32))


def of_base(base):
    return {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}


def kinds(artifact):
    found = [entry.kind for entry in artifact.manifest.tensors.values()]
    return {kind: found.count(kind) for kind in set(found)}


@pytest.fixture
def base(pair):
    return pair("llama", attention_bias=True)[0]


def test_pairs_are_kept_as_they_were_trained_and_the_rest_is_the_base_s(base, tmp_path):
    tensors = pairs(base, "q_proj", "v_proj", dtype=torch.bfloat16)
    artifact = converted(base, write_adapter(tmp_path / "adapter", tensors), tmp_path / "delta")
    artifact.verify()
    artifact.check_base(Checkpoint.open(base), full=True)
    assert kinds(artifact) == {"lowrank": 4, "same": len(of_base(base)) - 4}
    delta = artifact.read(f"{Q0}.weight")
    assert torch.equal(delta.left, tensors[f"{Q0}.lora_B.weight"])
    assert torch.equal(delta.right, tensors[f"{Q0}.lora_A.weight"])
    assert artifact.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert account(artifact).by_content == {"low-rank pairs": artifact.nbytes}
    merged, plain = restored(base, artifact), of_base(base)
    assert torch.equal(merged[f"{Q0}.weight"], plain[f"{Q0}.weight"] + product(tensors, Q0) * 2)
    assert torch.equal(merged["model.norm.weight"], plain["model.norm.weight"])


@pytest.mark.parametrize(
    ("fields", "scale"),
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"alpha_pattern": {"layers.0.self_attn.q_proj": 3}}, 0.75)],
)
def test_a_pair_counts_as_much_as_the_configuration_says(base, tmp_path, fields, scale):
    tensors = pairs(base, "q_proj", "v_proj")
    artifact = converted(base, write_adapter(tmp_path / "adapter", tensors, **fields), tmp_path / "delta")
    assert artifact.manifest.tensors[f"{Q0}.weight"].scale == scale
    found = restored(base, artifact)[f"{Q0}.weight"]
    assert torch.equal(found, of_base(base)[f"{Q0}.weight"] + product(tensors, Q0) * scale)


def test_modules_to_save_and_biases_are_their_own_values(base, tmp_path):
    plain = of_base(base)
    own = {name: plain[name] + 1 for name in (f"{Q0}.bias", "model.norm.weight", "lm_head.weight")}
    tensors = pairs(base, "q_proj", "v_proj")
    tensors |= {f"{Q0}.base_layer.bias": own[f"{Q0}.bias"], "model.norm.weight": own["model.norm.weight"]}
    tensors |= {"lm_head.modules_to_save.default.weight": own["lm_head.weight"]}
    tensors |= {"model.embed_tokens.weight": plain["model.embed_tokens.weight"]}  # saved, and unchanged
    adapter = write_adapter(tmp_path / "adapter", tensors, bias="lora_only", modules_to_save=["lm_head", "norm"])
    artifact = converted(base, adapter, tmp_path / "delta")
    assert kinds(artifact)["dense"] == 3
    merged = restored(base, artifact)
    for name, value in own.items():
        assert torch.equal(merged[name], value), name
    assert artifact.manifest.tensors["model.embed_tokens.weight"].kind == "same"


def test_a_whole_module_that_peft_saves_under_two_names_is_one(base, tmp_path):
    head, own = "lm_head.weight", of_base(base)["lm_head.weight"] + 1
    tensors = pairs(base, "q_proj", "v_proj") | {head: own, "lm_head.modules_to_save.weight": own.clone()}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    assert torch.equal(restored(base, converted(base, adapter, tmp_path / "delta"))[head], own)
    adapter = write_adapter(tmp_path / "two", tensors | {head: own + 1}, modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match="a second tensor for the same place"):
        Adapter.open(adapter)


def test_a_bias_of_lora_b_is_added_to_the_base_s_with_the_same_factor(base, pair, tmp_path):
    tensors = pairs(base, "q_proj", "v_proj")
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("weight", "bias")] = torch.full(tensors[name].shape[:1], 0.25)
    adapter = write_adapter(tmp_path / "adapter", tensors, lora_bias=True)
    merged = restored(base, converted(base, adapter, tmp_path / "delta"))
    assert torch.allclose(merged[f"{Q0}.bias"], of_base(base)[f"{Q0}.bias"] + 0.5, atol=0.01)
    without, _ = pair("mistral")
    with pytest.raises(CheckpointError, match=r"q_proj: has a bias, the base's module has none"):
        converted(without, adapter, tmp_path / "other")


def test_dora_is_merged_against_the_base(base, tmp_path):
    tensors = pairs(base, "q_proj", "v_proj")
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.linspace(1, 3, len(tensors[name]))
    artifact = converted(base, write_adapter(tmp_path / "adapter", tensors, use_dora=True), tmp_path / "delta")
    assert artifact.manifest.tensors[f"{Q0}.weight"].kind == "dense"
    moved = of_base(base)[f"{Q0}.weight"] + product(tensors, Q0) * 2
    wanted = moved * (torch.linspace(1, 3, len(moved)) / moved.norm(dim=1))[:, None]
    assert torch.equal(restored(base, artifact)[f"{Q0}.weight"], wanted.bfloat16().float())


@pytest.mark.parametrize("resized", [0, 2])
def test_trained_tokens_replace_rows_and_take_the_bytes_of_those_rows(base, tmp_path, resized):
    plain = of_base(base)["model.embed_tokens.weight"]
    rows = [7, 1900, *range(2048, 2048 + resized)]
    new = torch.randn(len(rows), 64, generator=torch.Generator().manual_seed(1))
    tensors = pairs(base, "q_proj", "v_proj")
    tensors["model.embed_tokens.token_adapter.trainable_tokens_delta"] = new
    if resized:
        more = torch.ones(resized, 64)
        tensors["model.embed_tokens.token_adapter.base_layer.weight"] = torch.cat([plain, more])
        tensors["lm_head.weight"] = torch.cat([of_base(base)["lm_head.weight"], more])
    adapter = write_adapter(tmp_path / "adapter", tensors, trainable_token_indices=rows)
    artifact = converted(base, adapter, tmp_path / "delta")
    entry = artifact.manifest.tensors["model.embed_tokens.weight"]
    assert entry.kind == "lowrank"
    assert entry.bytes < (len(rows) + 1) * 64 * 4
    assert artifact.manifest.expert.vocab_size == 2048 + resized
    merged = restored(base, artifact)["model.embed_tokens.weight"]
    assert torch.allclose(merged[rows], new, atol=1e-6)
    others = [row for row in range(2048) if row not in rows]
    assert torch.equal(merged[others], plain[others])


def test_many_trained_tokens_are_kept_as_the_whole_table(base, tmp_path):
    rows = list(range(0, 120, 3))
    tensors = pairs(base, "q_proj", "v_proj")
    tensors["model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.ones(len(rows), 64)
    adapter = write_adapter(tmp_path / "adapter", tensors, trainable_token_indices=rows)
    artifact = converted(base, adapter, tmp_path / "delta")
    assert artifact.manifest.tensors["model.embed_tokens.weight"].kind == "dense"
    wanted = of_base(base)["model.embed_tokens.weight"]
    wanted[rows] = 1
    assert torch.equal(restored(base, artifact)["model.embed_tokens.weight"], wanted)


def test_a_resized_table_under_a_pair_gives_the_added_rows(base, tmp_path):
    plain = of_base(base)
    tensors = pairs(base, "q_proj", "embed_tokens", "lm_head")
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.base_layer.weight"] = torch.cat([plain[f"{name}.weight"], torch.ones(3, 64)])
    draw = torch.randn(4, 2051, generator=torch.Generator().manual_seed(1))
    tensors["model.embed_tokens.lora_embedding_A"] = draw
    tensors["lm_head.lora_B.weight"] = draw.T.contiguous()
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["q_proj", "embed_tokens", "lm_head"])
    artifact = converted(base, adapter, tmp_path / "delta")
    merged = restored(base, artifact)
    delta = (tensors["model.embed_tokens.lora_embedding_B"] @ draw).T * 2
    wanted = tensors["model.embed_tokens.base_layer.weight"] + delta
    assert torch.allclose(merged["model.embed_tokens.weight"], wanted, atol=1e-5)
    assert merged["lm_head.weight"].shape == (2051, 64)
    assert json.loads((artifact.directory / "config.json").read_text())["vocab_size"] == 2051


@pytest.mark.parametrize("changed", ["embed_tokens", "lm_head"])
def test_an_adapter_of_one_side_of_a_tied_head_unties_it(pair, tmp_path, changed):
    base, _ = pair("llama", tied=True)
    module = changed if changed == "lm_head" else "model.embed_tokens"
    other = "model.embed_tokens" if changed == "lm_head" else "lm_head"
    shared = of_base(base)["model.embed_tokens.weight"]
    tensors = pairs(base, "q_proj", "v_proj") | {f"{module}.weight": shared + 1}
    artifact = converted(base, write_adapter(tmp_path / "adapter", tensors, modules_to_save=[changed]), tmp_path / "d")
    assert not artifact.manifest.expert.tied_head
    model = load_merged(base, artifact.directory)
    assert model.config.tie_word_embeddings is False
    state = model.state_dict()
    assert torch.equal(state[f"{module}.weight"], shared + 1)
    assert torch.equal(state[f"{other}.weight"], shared)


def test_trained_tokens_of_a_tied_model_change_both_sides(pair, tmp_path):
    base, _ = pair("llama", tied=True)
    tensors = pairs(base, "q_proj", "v_proj")
    tensors["model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.ones(1, 64)
    adapter = write_adapter(tmp_path / "adapter", tensors, trainable_token_indices=[5])
    artifact = converted(base, adapter, tmp_path / "delta")
    assert artifact.manifest.expert.tied_head
    state = load_merged(base, artifact.directory).state_dict()
    assert torch.allclose(state["lm_head.weight"][5], torch.ones(64), atol=1e-6)


def test_a_pair_of_a_transposed_linear_lies_as_its_weight(tmp_path):
    config = GPT2Config(vocab_size=256, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tensors = pairs(tmp_path / "base", "c_attn")
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["c_attn"], fan_in_fan_out=True)
    artifact = converted(tmp_path / "base", adapter, tmp_path / "delta")
    name = "transformer.h.0.attn.c_attn"
    wanted = of_base(tmp_path / "base")[f"{name}.weight"] + product(tensors, name).T * 2
    assert torch.allclose(restored(tmp_path / "base", artifact)[f"{name}.weight"], wanted, atol=1e-6)


def test_a_mixture_s_matrices_are_found_by_the_names_that_its_file_has(tmp_path):
    """Adapters of versions whose experts were modules of their own."""
    config = MixtralConfig(**(TINY | {"num_local_experts": 2, "vocab_size": 96, "num_hidden_layers": 1}))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    stored = of_base(tmp_path / "base")
    name = next(name for name in stored if name.endswith("experts.1.w1.weight")).removesuffix(".weight")
    rows, columns = stored[f"{name}.weight"].shape
    tensors = {f"{name}.lora_A.weight": torch.randn(4, columns), f"{name}.lora_B.weight": torch.randn(rows, 4)}
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["w1"])
    artifact = converted(tmp_path / "base", adapter, tmp_path / "delta")
    assert [n for n, entry in artifact.manifest.tensors.items() if entry.kind == "lowrank"] == [f"{name}.weight"]
    assert torch.equal(artifact.read(f"{name}.weight").dequantize(), product(tensors, name) * 2)


def mixture(root, tensors, **fields):
    """A mixture of four experts, and an adapter of its first layer's stack of down projections."""
    config = AutoConfig.for_model("qwen3_moe", **(TINY | FEW | {"vocab_size": 96}))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "base")
    fields = {"target_modules": [], "target_parameters": ["layers.0.mlp.experts.down_proj"]} | fields
    return root / "base", write_adapter(root / "adapter", tensors, **fields)


def test_a_stack_s_pair_is_shared_out_over_the_matrices_that_the_base_stores(tmp_path):
    a, b = torch.randn(4 * 4, 32), torch.randn(64, 4 * 4)
    name = "model.layers.0.mlp.experts"
    base, adapter = mixture(tmp_path, {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    artifact = converted(base, adapter, tmp_path / "delta")
    changed = [name for name, entry in artifact.manifest.tensors.items() if entry.kind == "lowrank"]
    assert changed == [f"{name}.{expert}.down_proj.weight" for expert in range(4)]
    for expert in range(4):
        delta = artifact.read(f"{name}.{expert}.down_proj.weight").dequantize()
        wanted = b.view(64, 4, 4)[:, :, expert] @ a.view(4, 4, 32)[expert] * 2
        assert torch.allclose(delta, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        (
            (16, 48),
            {},
            r"a pair \[16, 48\], \[64, 16\] for model.layers.0.mlp.experts.down_proj, a stack of 4",
        ),
        ((16, 32), {"r": 8}, r"where \[32, 32\], \[64, 32\] is wanted \(r, rank_pattern\)"),
        (
            (16, 32),
            {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
            r"target_parameters: model.layers.0.mlp.experts: 2 parameters .* but 1 pairs in the file",
        ),
    ],
)
def test_a_stack_s_pair_that_does_not_fit_is_refused(tmp_path, shape, fields, message):
    name = "model.layers.0.mlp.experts"
    tensors = {f"{name}.lora_A.weight": torch.ones(shape), f"{name}.lora_B.weight": torch.ones(64, 16)}
    base, adapter = mixture(tmp_path, tensors, **fields)
    with pytest.raises(CheckpointError, match=message):
        converted(base, adapter, tmp_path / "delta")


@pytest.mark.parametrize(
    ("change", "fields", "error", "message"),
    [
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 80)}),
            {},
            IncompatibleError,
            "a pair for .*80.*base's",
        ),
        (
            lambda t: t.update({"model.layers.9.self_attn.q_proj.weight": torch.ones(64, 64)}),
            {},
            CheckpointError,
            "layers.9.self_attn.q_proj: the base .* has no such module; it was trained on 'some/base'",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(80)}),
            {},
            IncompatibleError,
            r"model.norm.weight: \[80\], the base's",
        ),
        (
            lambda t: None,
            {"target_modules": ["q_proj"]},
            CheckpointError,
            "v_proj: has a pair, but adapter_config.json",
        ),
        (
            lambda t: None,
            {"exclude_modules": ["v_proj"]},
            CheckpointError,
            "v_proj: has a pair, but adapter_config.json",
        ),
        (lambda t: None, {"layers_to_transform": [0]}, CheckpointError, "layers.1.self_attn.q_proj: has a pair"),
        (
            lambda t: None,
            {"target_modules": ["q_proj", "v_proj", "o_proj"]},
            CheckpointError,
            "target_modules: o_proj: no tensor of it is in the file",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_B.weight": torch.full((64, 4), float("nan"))}),
            {},
            CheckpointError,
            "lora_B.weight: has NaN or infinite values",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(2050, 64)}),
            {},
            CheckpointError,
            "embedding and head have other numbers of tokens",
        ),
    ],
)
def test_what_does_not_fit_the_base_is_refused_by_name(base, tmp_path, change, fields, error, message):
    tensors = pairs(base, "q_proj", "v_proj")
    change(tensors)
    with pytest.raises(error, match=message):
        converted(base, write_adapter(tmp_path / "adapter", tensors, **fields), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_layers_without_a_pair_are_noted(base, tmp_path):
    tensors = {name: value for name, value in pairs(base, "q_proj", "v_proj").items() if "layers.1" in name}
    notes: list[str] = []
    converted(base, write_adapter(tmp_path / "adapter", tensors), tmp_path / "delta", notice=notes.append)
    assert len(notes) == 1
    assert "layers.0.self_attn.q_proj and 1 more have no pair: they stay the base's" in notes[0]


def test_a_quantised_base_is_refused(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", pairs(base, "q_proj", "v_proj"))
    edit_config(base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(IncompatibleError, match="quantization_config: its weights are quantised by bitsandbytes"):
        converted(base, adapter, tmp_path / "delta")


def test_its_own_configuration_may_not_compute_otherwise(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", pairs(base, "q_proj", "v_proj"))
    shutil.copyfile(base / "config.json", adapter / "config.json")
    edit_config(
        adapter, eos_token_id=[3, 9], quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}
    )
    artifact = converted(base, adapter, tmp_path / "delta")
    own = json.loads((artifact.directory / "config.json").read_text())
    assert (own["eos_token_id"], "quantization_config" in own) == ([3, 9], False)
    edit_config(adapter, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    with pytest.raises(IncompatibleError, match=r"adapter/config\.json: rope_parameters\.rope_theta: the adapter was"):
        converted(base, adapter, tmp_path / "other")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "-model."])
def test_a_base_that_is_stored_under_other_names_is_the_same(base, tmp_path, prefix):
    adapter = write_adapter(tmp_path / "adapter", pairs(base, "q_proj", "v_proj"))
    usual = restored(base, converted(base, adapter, tmp_path / "delta"))
    file = base / "model.safetensors"
    add, drop = (prefix, "") if prefix[0] != "-" else ("", prefix[1:])
    save_file({add + name.removeprefix(drop): value for name, value in load_file(file).items()}, file)
    other = restored(base, converted(base, adapter, tmp_path / "other"))
    assert usual.keys() == other.keys()
    assert all(torch.equal(usual[name], other[name]) for name in usual)


def test_an_adapter_speaks_as_the_base_unless_it_brings_its_own(base, tmp_path, family):
    adapter = write_adapter(tmp_path / "adapter", pairs(base, "q_proj", "v_proj"))
    (adapter / "chat_template.jinja").write_text("its own {{ messages }}")
    artifact = converted(base, adapter, tmp_path / "delta")
    assert (artifact.directory / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (artifact.directory / "chat_template.jinja").read_text() == "its own {{ messages }}"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<mine>"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(adapter)
    (adapter / "chat_template.jinja").unlink()
    artifact = converted(base, adapter, tmp_path / "own")
    assert AutoTokenizer.from_pretrained(artifact.directory).convert_tokens_to_ids("<mine>") == 2048
    assert (artifact.directory / "chat_template.jinja").read_text() == (base / "chat_template.jinja").read_text()


def test_an_adapter_is_opened_where_it_lies_and_leaves_nothing_behind(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", pairs(base, "q_proj", "v_proj"))
    before = sorted(adapter.iterdir())
    artifact = open_expert(adapter, Checkpoint.open(base))
    room = artifact.directory.parent
    artifact.verify()
    artifact.check_base(Checkpoint.open(base))
    del artifact
    assert not room.exists()
    assert sorted(adapter.iterdir()) == before


@pytest.mark.parametrize("weights", ["base", "expert"])
def test_beside_weights_it_counts_only_where_those_are_the_base_s_own(base, pair, tmp_path, weights, monkeypatch):
    monkeypatch.setattr("meswitch.checkpoint.find_spec", lambda name: None)  # as where PEFT is not installed
    _, expert = pair("llama", attention_bias=True)
    adapter = write_adapter(tmp_path / "adapter", pairs(base, "q_proj", "v_proj"))
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile({"base": base, "expert": expert}[weights] / file, adapter / file)
    notes: list[str] = []
    artifact = meswitch.compress(base, adapter, tmp_path / "delta", notice=notes.append)
    assert artifact.manifest.method.name == {"base": "lora", "expert": "me-switch"}[weights]
    assert any("the adapter beside the weights is not applied" in note for note in notes) is (weights == "expert")


def test_an_artifact_of_an_adapter_knows_its_base(base, pair, tmp_path):
    artifact = converted(base, write_adapter(tmp_path / "a", pairs(base, "q_proj", "v_proj")), tmp_path / "delta")
    other, _ = pair("qwen2", seed=1)
    with pytest.raises(IncompatibleError, match="fingerprint"):
        artifact.check_base(Checkpoint.open(other))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda entry: entry.pop("scale"), "scale: None is not a finite number"),
        (lambda entry: entry.update(bits=2), "bits: not a field of a lowrank tensor"),
        (lambda entry: entry["stored"].pop("weight_right"), "a low-rank tensor has two parts of two dimensions"),
        (lambda entry: entry.update(shape=[64, 32]), "do not fit the tensor"),
    ],
)
def test_a_damaged_entry_of_a_pair_is_refused(base, tmp_path, edit, message):
    artifact = converted(base, write_adapter(tmp_path / "a", pairs(base, "q_proj", "v_proj")), tmp_path / "delta")
    file = artifact.directory / "meswitch.json"
    data = json.loads(file.read_text())
    edit(data["tensors"][f"{Q0}.weight"])
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(artifact.directory)

"""A LoRA adapter of a full fine-tune: the best of its rank, and what it cannot hold is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import meswitch
from meswitch.adapter import Adapter, open_expert
from meswitch.checkpoint import Checkpoint
from meswitch.codec import lowrank
from meswitch.compression.extraction import LEFT_OUT, PAIR, WHOLE, LoraOptions, best_pair, extract_lora, short_names
from meswitch.compression.merge import load_merged, merged_tensors
from meswitch.errors import ConfigError, IncompatibleError, MeswitchError

UP = "model.layers.0.mlp.up_proj.weight"
SMALL = {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None, "hidden_size": None}
GPT2 = SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 2, "num_hidden_layers": None, "num_attention_heads": None}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def restored(base, adapter):
    """The expert as the adapter's own reader makes it."""
    opened = Checkpoint.open(base)
    return dict(merged_tensors(opened, open_expert(adapter, opened), torch.float32))


def names(found, how):
    return {item.name for item in found.tensors if item.how == how}


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("arch", "case"),
    [
        ("llama", {}),
        ("llama", {"tied": True}),
        ("llama", {"added_tokens": 3}),
        ("llama", {"tied": True, "added_tokens": 3}),
        ("qwen3", {"tied": True}),
        ("gpt2", {"tied": True, **GPT2}),
    ],
    ids=["llama", "tied", "added tokens", "added tokens of a tied model", "norms of heads", "Conv1D"],
)
def test_a_full_rank_with_whole_modules_is_the_fine_tune(pair, tmp_path, arch, case):
    base, expert = pair(arch, dtype=torch.float32, **case)
    found = extract_lora(base, expert, tmp_path / "adapter", LoraOptions(1 << 20, modules_to_save=True))
    assert found.rank < 1 << 20
    wanted, made = Checkpoint.open(expert).loaded, restored(base, tmp_path / "adapter")
    for name in wanted.tensors:
        if name not in names(found, LEFT_OUT):
            assert torch.allclose(made[name], wanted.read(name), atol=2e-6), name
    assert found.of(PAIR).share == pytest.approx(1, abs=1e-6)
    assert found.of(WHOLE).share == 1
    assert not found.added_rows or found.added_kept
    biases = {name for name in wanted.tensors if arch == "gpt2" and name.endswith("bias") and "ln_" not in name}
    assert names(found, LEFT_OUT) == biases


def test_what_is_kept_is_what_the_singular_values_say(pair, tmp_path):
    base, expert = pair("llama", dtype=torch.float32)
    found = extract_lora(base, expert, tmp_path / "adapter", LoraOptions(5))
    before, after = load_file(base / "model.safetensors"), load_file(expert / "model.safetensors")
    made = restored(base, tmp_path / "adapter")
    assert names(found, PAIR) == {name for name in before if name.endswith("proj.weight")} | {"lm_head.weight"}
    for item in found.tensors:
        delta = after[item.name] - before[item.name]
        assert item.energy == pytest.approx(float(delta.double().square().sum()), rel=1e-6)
        if item.how == PAIR:
            values = torch.linalg.svdvals(delta.double())
            assert item.kept == pytest.approx(float(values[:5].square().sum()), rel=1e-4)
            missed = (after[item.name] - made[item.name]).double().square().sum()
            assert item.energy - item.kept == pytest.approx(float(missed), rel=1e-4)
        else:
            assert item.kept == 0
            assert torch.equal(made[item.name], before[item.name])
    sums = found.of(PAIR, WHOLE, LEFT_OUT)
    assert sums.energy == pytest.approx(sum(energy.energy for energy in found.by_type().values()))
    assert sums.kept == pytest.approx(found.of(PAIR).kept)


def test_the_pairs_of_a_16_bit_fine_tune_are_16_bit_and_what_that_rounds_counts(pair, tmp_path):
    base, expert = pair("llama", dtype=torch.bfloat16)
    found = extract_lora(base, expert, tmp_path / "adapter", LoraOptions(1 << 20))
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert 0.999 < found.of(PAIR).share < 1


@pytest.mark.parametrize("decay", [0.0, 0.5], ids=["all singular values alike", "falling ones"])
def test_a_large_matrix_keeps_nearly_the_best(monkeypatch, decay):
    monkeypatch.setattr(lowrank, "EXACT_WIDTH", 16)
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(400, 600, generator=draw) * torch.arange(1, 601) ** -decay
    best = torch.linalg.svdvals(delta)[:16].square().sum()
    before = torch.random.get_rng_state()
    left, right = best_pair(delta, 16)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(best_pair(delta, 16)[0], left)
    kept = delta.square().sum() - (delta - left @ right).square().sum()
    assert kept > 0.99 * best


def test_with_the_inputs_a_pair_is_the_best_for_the_outputs():
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(30, 40, generator=draw)
    inputs = torch.randn(500, 40, generator=draw) * torch.arange(1, 41) ** -1.0
    missed = {}
    for name, moment in {"free": None, "calibrated": inputs.T @ inputs / 500}.items():
        left, right = best_pair(delta, 6, moment)
        missed[name] = float((inputs @ (delta - left @ right).T).square().sum())
    best = float(torch.linalg.svdvals(inputs @ delta.T)[6:].square().sum())
    assert best <= missed["calibrated"] < 1.05 * best
    assert missed["calibrated"] < 0.8 * missed["free"]


def test_calibration_text_shapes_the_pairs(family, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join((family / "calibration" / "math.jsonl").read_text().splitlines()[:60]))
    found = extract_lora(family / "base", family / "math", tmp_path / "calibrated", LoraOptions(8, calibration=text))
    free = extract_lora(family / "base", family / "math", tmp_path / "free", LoraOptions(8))
    assert all(item.output_energy > item.output_kept > 0 for item in found.tensors if item.how == PAIR)
    assert found.of(PAIR).share < free.of(PAIR).share < found.of(PAIR).output_share
    assert [item.name for item in found.tensors] == [item.name for item in free.tensors]
    assert free.of(PAIR).output_share is None
    whole = extract_lora(family / "base", family / "math", tmp_path / "whole", LoraOptions(1 << 20, calibration=text))
    assert whole.of(PAIR).share > 0.9999
    with pytest.raises(ConfigError, match=r"none\.txt: no such calibration file"):
        extract_lora(
            family / "base", family / "math", tmp_path / "none", LoraOptions(8, calibration=tmp_path / "none.txt")
        )


def test_a_pair_of_a_matrix_narrower_than_the_rank_is_filled_up_with_zeros():
    delta = torch.randn(3, 8)
    left, right = best_pair(delta, 5)
    assert (left.shape, right.shape) == ((3, 5), (5, 8))
    assert torch.allclose(left @ right, delta, atol=1e-5)
    assert not left[:, 3:].any()
    assert not right[3:].any()


def test_the_configuration_is_a_plain_lora(pair, tmp_path):
    base, expert = pair("llama")
    extract_lora(base, expert, tmp_path / "adapter", LoraOptions(4))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 4, None)
    assert config["base_model_name_or_path"] == str(base)
    projections = ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == projections
    assert (tmp_path / "adapter/chat_template.jinja").read_text() == (expert / "chat_template.jinja").read_text()
    assert not (tmp_path / "adapter/config.json").exists()
    assert Adapter.open(tmp_path / "adapter").rank == 4


def test_a_layer_that_did_not_change_has_no_pair_and_the_others_are_named(pair, tmp_path):
    base, expert = pair("llama")
    kept = load_file(base / "model.safetensors")[UP]
    edit(expert, lambda tensors: tensors.update({UP: kept}))
    found = extract_lora(base, expert, tmp_path / "adapter", LoraOptions(4))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert "model.layers.1.mlp.up_proj" in config["target_modules"]
    assert "up_proj" not in config["target_modules"]
    assert UP not in {item.name for item in found.tensors}
    assert torch.equal(restored(base, tmp_path / "adapter")[UP], kept.float())


def test_a_name_stands_for_modules_that_all_have_a_pair():
    known = dict.fromkeys(["a.q", "b.q", "a.k", "b.k", "k", "head"], nn.Identity())
    assert short_names(["a.q", "b.q", "a.k", "b.k", "head"], known) == ["a.k", "b.k", "head", "q"]


def test_biases_and_the_experts_of_a_mixture_are_named_as_left_out(pair, tmp_path):
    found = extract_lora(*pair("qwen2"), tmp_path / "biases", LoraOptions(4, modules_to_save=True))
    assert {name.rpartition(".")[2] for name in names(found, LEFT_OUT)} == {"bias"}
    found = extract_lora(*pair("qwen3_moe", **FEW), tmp_path / "mixture", LoraOptions(4, modules_to_save=True))
    assert {".experts." in name for name in names(found, LEFT_OUT)} == {True}
    assert any("mlp.gate.weight" in name for name in names(found, PAIR) | names(found, WHOLE))


def test_added_tokens_are_left_out_with_their_tokenizer(pair, tmp_path):
    base, expert = pair("llama", added_tokens=2)
    found = extract_lora(base, expert, tmp_path / "adapter", LoraOptions(4))
    assert (found.added_rows, found.added_kept) == (2, False)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= names(found, LEFT_OUT)
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_engine_serves_what_was_extracted(pair, tmp_path):
    base, expert = pair("llama", dtype=torch.float32, change=0.3)
    extract_lora(base, expert, tmp_path / "adapter", LoraOptions(1 << 20, modules_to_save=True))
    with meswitch.Engine(base, {"one": tmp_path / "adapter"}, device="cpu") as engine:
        answer = engine.generate(["Hello there"], model="one", max_new_tokens=12)[0]
        ids = torch.tensor([engine.tokenizers["one"].encode("Hello there")])
        model = load_merged(base, tmp_path / "adapter")
        with torch.no_grad():
            wanted = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=[-1])
    assert answer.tokens == tuple(wanted[0, ids.shape[1] :].tolist())[: len(answer.tokens)]


def test_what_cannot_be_extracted_is_refused(pair, tmp_path, family):
    base, expert = pair("llama")
    with pytest.raises(ConfigError, match="rank: 0 is not a positive number"):
        extract_lora(base, expert, tmp_path / "adapter", LoraOptions(0))
    with pytest.raises(ConfigError, match="no linear layer changed"):
        extract_lora(base, base, tmp_path / "adapter", LoraOptions(4))
    with pytest.raises(ConfigError, match=r"already exists; choose another --out$"):
        extract_lora(base, expert, base, LoraOptions(4), overwrite=True)
    with pytest.raises(IncompatibleError, match="model_type"):
        extract_lora(family / "base", expert, tmp_path / "adapter", LoraOptions(4))
    assert not list(tmp_path.glob("adapter*"))
    extract_lora(base, expert, tmp_path / "adapter", LoraOptions(4))
    with pytest.raises(ConfigError, match="already exists; choose another --out or --overwrite"):
        extract_lora(base, expert, tmp_path / "adapter", LoraOptions(2))
    assert extract_lora(base, expert, tmp_path / "adapter", LoraOptions(2), overwrite=True).rank == 2
    edit(expert, lambda tensors: tensors[UP][0, 0].fill_(float("nan")))
    with pytest.raises(MeswitchError, match=rf"{UP}: 1 of .* delta values are NaN"):
        extract_lora(base, expert, tmp_path / "other", LoraOptions(4))


@pytest.mark.parametrize(
    ("arch", "case"),
    [("llama", {}), ("llama", {"tied": True}), ("gpt2", {"tied": True, **GPT2}), ("qwen3_moe", FEW)],
    ids=["llama", "tied", "Conv1D", "mixture"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["pairs", "whole modules"])
def test_peft_computes_what_our_reader_makes_of_it(pair, tmp_path, arch, case, whole):
    peft = pytest.importorskip("peft", reason="needs meswitch[lora]")
    base, expert = pair(arch, dtype=torch.float32, **case)
    extract_lora(base, expert, tmp_path / "adapter", LoraOptions(1 << 20, modules_to_save=whole))
    tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        found, wanted = tuned(ids).logits, load_merged(base, tmp_path / "adapter")(ids).logits
        assert torch.allclose(found, wanted, atol=1e-4)
        if whole and arch == "llama":  # then nothing was left out
            assert torch.allclose(found, AutoModelForCausalLM.from_pretrained(expert)(ids).logits, atol=1e-4)

"""What PEFT itself trains, saves and merges, against base + artifact."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from meswitch.adapter import Adapter, write_artifact
from meswitch.checkpoint import Checkpoint
from meswitch.compression.merge import load_merged
from tests.support.models import TINY

peft = pytest.importorskip("peft", reason="needs meswitch[lora]")

LLAMA = {**TINY, "vocab_size": 96, "initializer_range": 0.2}
FEW = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODELS = {
    "llama": LlamaConfig(**LLAMA),
    "biases": LlamaConfig(**LLAMA, attention_bias=True),
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "matrix by matrix": AutoConfig.for_model("qwen3_moe", **(LLAMA | FEW)),
    "in stacks": AutoConfig.for_model("gpt_oss", **(LLAMA | FEW)),
}
CASES = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear, rsLoRA, patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"layers.1.*.q_proj": 8},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "one layer": ("llama", {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "pattern": ("llama", {"target_modules": r".*\.0\..*(q|up)_proj"}),
    "embedding and head": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "all biases": ("biases", {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of pairs": ("biases", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias of B": ("biases", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "DoRA": ("llama", {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_dora": True}),
    "DoRA of Conv1D": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 90]}),
    "tokens of a tied model": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 90]}),
    "tokens of both": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [5, 6]}},
    ),
    "stacks, stored matrix by matrix": ("matrix by matrix", {"target_modules": [], "target_parameters": STACKS}),
    "all linears of a mixture": ("matrix by matrix", {"target_modules": "all-linear"}),
    "one stack": ("matrix by matrix", {"target_modules": ["q_proj"], "target_parameters": STACKS[1:]}),
    "stacks, stored as such": ("in stacks", {"target_modules": ["q_proj"], "target_parameters": STACKS}),
    "added tokens": ("llama", {"target_modules": ["q_proj"]}),
    "added tokens in whole modules": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "added and trained tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [96, 97]}),
    "added tokens under a pair": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "embedding of a tied model, whole": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
}
# PEFT merges these into both sides of the shared matrix, unlike what it computes before; what it computes is served.
UNMERGED = {
    "embedding of a tied model": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "both sides of a tied model": ("tied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "kept tied": ("tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
}


def trained(tmp_path, model, fields, added=0):
    """A base, and an adapter of PEFT over it whose every trained value moved."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[model]).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    if added:
        model.resize_token_embeddings(96 + added, mean_resizing=False)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(adapter)
    return base, adapter


def loaded(base, adapter, added=0):
    model = AutoModelForCausalLM.from_pretrained(base)
    if added:
        model.resize_token_embeddings(96 + added, mean_resizing=False)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("case", CASES)
def test_base_and_artifact_are_what_peft_merges(tmp_path, case):
    added = 2 if case.startswith("added") else 0
    base, adapter = trained(tmp_path, *CASES[case], added)
    artifact = write_artifact(Checkpoint.open(base), Adapter.open(adapter), tmp_path / "delta")
    assert artifact.manifest.expert.vocab_size == 96 + added
    ours = load_merged(base, artifact.directory).state_dict()
    theirs = loaded(base, adapter, added).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("case", UNMERGED)
@torch.no_grad()
def test_pairs_of_a_tied_matrix_count_as_peft_computes_them(tmp_path, case):
    base, adapter = trained(tmp_path, *UNMERGED[case])
    artifact = write_artifact(Checkpoint.open(base), Adapter.open(adapter), tmp_path / "delta")
    ids = torch.arange(40)[None]
    wanted = loaded(base, adapter)(ids).logits
    assert torch.allclose(load_merged(base, artifact.directory)(ids).logits, wanted, atol=1e-4)

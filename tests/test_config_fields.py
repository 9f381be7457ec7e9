"""Fields of two configurations count if the code of the model reads them, as they are once parsed."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from meswitch.configuration import (
    INACTIVE,
    METADATA,
    OF_EACH,
    TRAINING,
    UNREAD,
    config_differences,
    read_config,
)
from tests.support.models import TINY

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.fixture
def compare(tmp_path):
    """`compare(model_type, base, expert)`: differences of two `config.json` that differ in these fields."""

    def run(model_type, base, expert, **both):
        configs = []
        for name, fields in (("base", base), ("expert", expert)):
            file = tmp_path / name / "config.json"
            file.parent.mkdir()
            shared = {name: value for name, value in TINY.items() if name != "head_dim"}
            file.write_text(json.dumps(shared | {"model_type": model_type} | both | fields))
            configs.append(read_config(file.parent))
        return {item.field: item.reason for item in config_differences(*configs) if item.reason != METADATA}

    return run


@pytest.mark.parametrize(
    ("model_type", "base", "expert", "reasons"),
    [
        ("qwen2", {}, {"unsloth_version": "2024.11.7", "unsloth_fixed": True}, {UNREAD}),
        ("qwen2", {"use_mrope": False}, {}, {UNREAD}),
        ("qwen2", {"max_window_layers": 24, "sliding_window": 32768}, {"max_window_layers": 21}, {UNREAD}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, {"sliding_window": None}, set()),
        ("llama", {"pretraining_tp": 1}, {"pretraining_tp": 2}, {UNREAD}),
        ("llama", {}, {"auto_map": {"AutoModel": "x.Y"}, "_attn_implementation_autoset": True}, set()),
        ("llama", {"torch_dtype": "float16"}, {"dtype": "bfloat16"}, set()),
        ("llama", {"use_cache": True}, {"use_cache": False, "gradient_checkpointing": True}, {TRAINING}),
        ("llama", {"quantization_config": None}, {}, set()),
        ("llama", {"attention_dropout": 0.1}, {"initializer_range": 0.5}, {TRAINING}),
        ("mixtral", {"router_aux_loss_coef": 0.1}, {"output_router_logits": True}, {TRAINING}),
        ("llama", {"vocab_size": 2050}, {"eos_token_id": [3, 4], "pad_token_id": 0}, {OF_EACH}),
        ("llama", {"max_position_embeddings": 4096}, {"max_position_embeddings": 32768}, {OF_EACH}),
        ("llama", {"rope_theta": 500000}, {"rope_parameters": {"rope_theta": 500000.0}}, set()),
        ("llama", {"rope_theta": 500000}, {"rope_theta": 500000.0, "rope_scaling": None}, set()),
        ("llama", {"rope_scaling": {"type": "default"}}, {"rope_scaling": None}, set()),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}},
         {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1, 2]}}, {INACTIVE}),
        ("llama", {"head_dim": None}, {"head_dim": 16}, set()),
        ("qwen2", {"head_dim": 16}, {}, {INACTIVE}),
        ("phi3", {}, {"partial_rotary_factor": 1.0}, {INACTIVE}),
        ("smollm3", {"sliding_window": 64}, {"sliding_window": None}, {INACTIVE}),
        ("gpt_oss", {"attention_dropout": 0.5}, {"hidden_act": "gelu"}, {TRAINING, UNREAD}),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_told_from_what_has(compare, model_type, base, expert, reasons):
    assert set(compare(model_type, base, expert).values()) == reasons


@pytest.mark.parametrize(
    ("model_type", "base", "expert", "field"),
    [
        ("llama", {}, {"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ("llama", {}, {"rope_theta": 500000.0}, "rope_parameters.rope_theta"),
        ("llama", {}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters.rope_type"),
        ("llama", {"rope_scaling": YARN}, {"rope_scaling": YARN | {"factor": 8.0}}, "rope_parameters.factor"),
        ("phi3", {}, {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor"),
        ("phi", {}, {"partial_rotary_factor": 1.0}, "rope_parameters.partial_rotary_factor"),
        ("llama", {}, {"hidden_act": "gelu"}, "hidden_act"),
        ("mistral", {"sliding_window": 64}, {"sliding_window": None}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
         {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, "layer_types"),
        ("mixtral", {"num_experts_per_tok": 2}, {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        ("cohere", {"logit_scale": 0.0625}, {"logit_scale": 1.0}, "logit_scale"),
        ("granite", {"residual_multiplier": 1.0}, {"residual_multiplier": 0.22}, "residual_multiplier"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 128},
         {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 256},
         "max_position_embeddings"),
        ("llama", {"rope_scaling": LONG | {"original_max_position_embeddings": 64}, "max_position_embeddings": 128},
         {"rope_scaling": LONG | {"original_max_position_embeddings": 64}, "max_position_embeddings": 256},
         "max_position_embeddings"),
    ],
)  # fmt: skip
def test_what_changes_the_computation_counts(compare, model_type, base, expert, field):
    assert field in [name for name, reason in compare(model_type, base, expert).items() if reason is None]


def test_a_yarn_factor_that_is_given_makes_the_length_free(compare):
    found = compare("llama", {"max_position_embeddings": 256}, {"max_position_embeddings": 512}, rope_scaling=YARN)
    assert found == {"max_position_embeddings": OF_EACH}


def test_fields_of_parts_carry_their_path(compare):
    text = TINY | {"sliding_window": 64}
    found = compare(
        "gemma3",
        {"text_config": text | {"rms_norm_eps": 1e-3, "vocab_size": 2050}},
        {"text_config": text | {"unsloth_fixed": True}, "vision_config": {"layer_norm_eps": 1e-2}},
    )
    assert found == {
        "text_config.rms_norm_eps": None,
        "text_config.vocab_size": OF_EACH,
        "text_config.unsloth_fixed": UNREAD,
        "vision_config.layer_norm_eps": None,
    }


def test_other_names_of_a_field_are_known():
    one, other = GPT2Config(n_layer=1, n_head=2, n_embd=32), GPT2Config(n_layer=1, n_head=4, n_embd=32)
    assert [(item.field, item.reason) for item in config_differences(one, other)] == [("n_head", None)]


WINDOWED = (
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "minimax",
    "ministral",
    "olmo3",
    "qwen3",
    "smollm3",
)


@pytest.mark.parametrize("model_type", WINDOWED)
def test_a_window_is_called_inactive_only_where_logits_do_not_depend_on_it(model_type):
    base = AutoConfig.for_model(model_type, **TINY, layer_types=["full_attention"] * 2, num_local_experts=4)
    base.sliding_window = 4
    expert = copy.deepcopy(base)
    expert.sliding_window = 200
    (found,) = config_differences(base, expert)
    logits = []
    for config in (base, expert):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(torch.arange(30)[None] * 7).logits)
    if found.reason is not None:
        assert torch.equal(*logits)
    assert (found.reason is None) == (model_type in ("exaone4", "minimax"))

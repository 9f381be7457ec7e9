"""What a tensor is comes from the model that transformers lays out, and stored names go the way that it loads them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from meswitch.architecture import architecture_of
from meswitch.errors import CheckpointError
from tests.support.models import TINY

ROLES = {
    "llama": {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head", "model.norm.weight": "norm"},
    "gpt2": {
        "transformer.wpe.weight": "embedding",
        "transformer.h.0.attn.c_attn.weight": "transposed",
        "transformer.h.0.attn.c_attn.bias": "bias",
    },
    "qwen3_moe": {
        "model.layers.0.mlp.experts.0.gate_proj.weight": "linear",
        "model.layers.0.mlp.gate.weight": "router",
    },
    "gpt_oss": {
        "model.layers.0.mlp.experts.gate_up_proj": "transposed experts",
        "model.layers.0.self_attn.sinks": "other",
    },
    "mamba": {"backbone.embeddings.weight": "embedding", "backbone.layers.0.mixer.conv1d.weight": "convolution"},
}


def layout(model_type, **fields):
    few = {"num_experts": 4, "num_local_experts": 4}
    return architecture_of(AutoConfig.for_model(model_type, **(TINY | few | fields)))


def shapes(architecture):
    return {name: tuple(tensor.shape) for name, tensor in architecture.stored_layout().items()}


@pytest.mark.parametrize("model_type", ROLES)
def test_a_tensor_is_what_its_module_makes_of_it(model_type):
    architecture = layout(model_type)
    roles = architecture.roles(shapes(architecture))
    assert {name: roles[name] for name in ROLES[model_type]} == ROLES[model_type]


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "mixtral", "phimoe", "granitemoe", "qwen3_5_text"])
def test_what_is_saved_is_loaded_again(model_type, tmp_path):
    architecture = layout(model_type)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture.config)
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, model.state_dict())
    plan = architecture.load_plan(stored)
    assert not plan.missing
    assert not plan.unneeded
    made = {}
    for conversion in plan.conversions:
        made |= conversion.build(stored.__getitem__, architecture.model)
    for name, value in model.state_dict().items():
        assert torch.equal(made[name], value), name


def test_prefixes_of_wrappers_and_missing_ones_change_nothing():
    architecture = layout("llama")
    for rename in (
        lambda name: name,
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.removeprefix("model."),
    ):
        plan = architecture.load_plan([rename(name) for name in architecture.parts])
        assert not plan.missing
        assert plan.parameters_of(rename("model.layers.0.mlp.up_proj.weight")) == ("model.layers.0.mlp.up_proj.weight",)


def test_buffers_that_no_parameter_needs_are_named():
    architecture = layout("llama")
    plan = architecture.load_plan([*architecture.parts, "model.layers.0.self_attn.rotary_emb.inv_freq"])
    assert plan.unneeded == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def test_a_tied_head_is_not_missing_whichever_side_is_stored():
    architecture = layout("llama", tie_word_embeddings=True)
    names = set(architecture.parts)
    for left_out in ("lm_head.weight", "model.embed_tokens.weight"):
        assert not architecture.load_plan(names - {left_out}).missing
    assert architecture.load_plan(names - {"model.norm.weight"}).missing == ("model.norm.weight",)


def test_the_whole_vision_language_model_is_laid_out():
    config = AutoConfig.for_model("gemma3")
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    architecture = architecture_of(config)
    assert architecture.is_multimodal
    assert architecture.model_class is AutoModelForImageTextToText._model_mapping[type(config)]
    assert any("vision" in name for name in architecture.parts)


def test_a_model_that_does_not_generate_is_refused_by_name():
    with pytest.raises(CheckpointError, match="model_type: 'vit'"):
        architecture_of(AutoConfig.for_model("vit"))


def test_the_same_names_lead_to_one_plan_and_others_to_another():
    architecture = layout("llama")
    names = list(architecture.stored_layout())
    plan = architecture.load_plan(names)
    assert architecture.load_plan(dict.fromkeys(reversed(names))) is plan
    assert architecture.load_plan(names[1:]) != plan

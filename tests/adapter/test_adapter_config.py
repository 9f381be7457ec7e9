"""What an adapter asks for is applied, or refused by the name of its field."""

import pytest
import torch

from meswitch.adapter import Adapter, AdapterConfig
from meswitch.errors import CheckpointError
from tests.support.adapters import pairs, write_adapter


def config(tmp_path, **fields) -> AdapterConfig:
    return AdapterConfig.read(
        write_adapter(tmp_path / "adapter", {"x": torch.ones(1)}, **fields) / "adapter_config.json"
    )


def test_the_scale_is_alpha_over_the_rank_or_its_root(tmp_path):
    assert config(tmp_path, r=16, lora_alpha=32).scale("model.layers.0.self_attn.q_proj") == 2
    assert config(tmp_path, r=16, lora_alpha=32, use_rslora=True).scale("model.layers.0.self_attn.q_proj") == 8


def test_patterns_give_modules_their_own_rank_and_alpha(tmp_path):
    found = config(tmp_path, rank_pattern={"layers.1.*v_proj": 8}, alpha_pattern={"v_proj": 2})
    assert found.rank_of("model.layers.1.self_attn.v_proj") == 8
    assert found.rank_of("model.layers.0.self_attn.v_proj") == 4
    assert found.scale("model.layers.1.self_attn.v_proj") == 2 / 8
    assert found.scale("model.layers.1.self_attn.q_proj") == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: IA3: of PEFT's methods only LORA is read; merge it with PEFT"),
        ({"peft_type": "LOHA"}, "peft_type: LOHA"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type: PREFIX_TUNING trains a prompt"),
        ({"peft_type": None}, "peft_type: missing field"),
        ({"task_type": "SEQ_CLS"}, "task_type: SEQ_CLS"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes the base's weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' changes the base's weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: 'loftq' changes the base's weights"),
        ({"init_lora_weights": "newest"}, "init_lora_weights: 'newest' is not known"),
        ({"use_qalora": True}, "use_qalora: QALoRA"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens: activated LoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: it repeats layers"),
        ({"kasa_config": {"beta": 1}}, "kasa_config: KaSA"),
        ({"use_something_new": True}, "use_something_new: unknown field, and true may change"),
        ({"something_config": {"a": 1}}, "something_config: unknown field"),
        ({"bias": "some"}, "bias: 'some' is none of"),
        ({"r": 0}, "r: 0 is not a positive number"),
        ({"r": "8"}, "r: expected int, found '8'"),
        ({"lora_alpha": True}, "lora_alpha: expected int or float, found True"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern.q_proj: expected a number"),
        ({"rank_pattern": {"(": 8}}, "rank_pattern: '\\(' is not a pattern"),
        ({"modules_to_save": [1]}, "modules_to_save: expected a list of names"),
    ],
)
def test_what_is_not_applied_is_refused_by_the_field_s_name(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {message}"):
        config(tmp_path, **fields)


def test_fields_of_training_and_neutral_unknown_ones_are_no_obstacle(tmp_path):
    found = config(
        tmp_path, megatron_core="megatron.core", qalora_group_size=16, use_new=False, new_config=None, new_size=3,
        velora_config={"scale": 1}, auto_mapping={"unsloth_fixed": True}, init_lora_weights="gaussian",
    )  # fmt: skip
    assert [note.partition("adapter_config.json: ")[2] for note in found.notes] == ["new_size: unknown field, not used"]


@pytest.mark.parametrize(
    ("fields", "yes", "no"),
    [
        ({"target_modules": ["q_proj"]}, ["model.layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.xq_proj"]),
        ({"target_modules": r".*1\.self_attn\.(q|k)_proj"}, ["model.layers.1.self_attn.k_proj"], ["lm_head"]),
        ({"target_modules": "all-linear"}, ["model.layers.1.mlp.up_proj"], ["model.embed_tokens"]),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
            ["model.layers.1.self_attn.q_proj"],
            ["model.layers.0.self_attn.q_proj"],
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1]},
            ["model.layers.1.self_attn.q_proj"],
            ["model.layers.0.self_attn.q_proj"],
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
            ["model.layers.1.self_attn.q_proj"],
            ["model.layers.11.self_attn.q_proj"],
        ),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, [], ["lm_head"]),
    ],
)
def test_modules_are_chosen_as_peft_chooses_them(tmp_path, fields, yes, no):
    found = config(tmp_path, **fields)
    linear = {"model.layers.1.mlp.up_proj"}
    assert all(found.targets(name, linear) for name in yes)
    assert not any(found.targets(name, linear) for name in no)


def test_a_damaged_configuration_is_one_line(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", {"x": torch.ones(1)})
    (adapter / "adapter_config.json").write_text('{"r": 8,')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: "):
        Adapter.open(adapter)


def test_pickled_weights_are_refused_with_the_conversion_to_do(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", {"x": torch.ones(1)})
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: a pickle, which is never opened; convert it"):
        Adapter.open(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="this PEFT adapter is incomplete"):
        Adapter.open(adapter)


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda t: t.pop("model.layers.0.self_attn.q_proj.lora_B.weight"), {}, "q_proj: has no lora_B"),
        (lambda t: None, {"r": 8}, "a pair of rank 4 and 4, but adapter_config.json says 8"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_E": torch.ones(4)}),
            {},
            "not a tensor of plain LoRA",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(0)}),
            {},
            "is empty: it was saved without gathering the parts of DeepSpeed",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(64)}),
            {},
            "has a lora_magnitude_vector, but adapter_config.json says use_dora = false",
        ),
        (
            lambda t: None,
            {"use_dora": True},
            "has no lora_magnitude_vector, but adapter_config.json says use_dora = true",
        ),
        (lambda t: None, {"lora_bias": True}, "has no bias of lora_B, but adapter_config.json says lora_bias = true"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)}),
            {},
            "int8: an adapter is read in 16 bit or more",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_refused_by_name(pair, tmp_path, change, fields, message):
    base, _ = pair("llama")
    tensors = pairs(base, "q_proj", "v_proj")
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(write_adapter(tmp_path / "adapter", tensors, **fields))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: f"module.{name}",
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    ],
)
def test_names_of_wrappers_and_of_the_adapter_change_nothing(pair, tmp_path, rename):
    from safetensors.torch import load_file, save_file

    base, _ = pair("llama")
    adapter = write_adapter(tmp_path / "adapter", pairs(base, "q_proj", "v_proj"))
    wanted = set(Adapter.open(adapter).pairs)
    file = adapter / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
    assert set(Adapter.open(adapter).pairs) == wanted

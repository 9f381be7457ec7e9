"""Tiny checkpoints of every model type that transformers generates text with."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from meswitch.architecture import model_class
from tests.support.models import TINY

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Several names mean the same size: a configuration takes those that it knows.
_SMALL = TINY | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "initializer_range": 0.1,
}
_MLA = {  # multi-head latent attention: heads have sizes of their own
    "head_dim": ...,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_INDEXED = _MLA | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
_LINEAR = {  # linear attention in the first layer, softmax attention in the second
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "shared_expert_intermediate_size": 32,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_DBRX = {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
_TEXT = TINY | {"sliding_window": 64, "initializer_range": 0.1}
_ROTATED = {"rope_type": "default", "rope_theta": 10000.0}
# What a model type needs besides, so that it is small and whole; `...` leaves a size to the model type.
FIELDS: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _INDEXED,
    "bailing_hybrid": _MLA | _LINEAR | {"num_expert_group": 1, "num_experts_per_token": 2, "q_lora_rank": None},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cpmant": {"dim_head": 16, "dim_ff": 128, "prompt_length": 4},
    "ctrl": {"dff": 128},
    "dbrx": {
        "vocab_size": 2048,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": _DBRX,
    },
    "deepseek_v2": _MLA | {"topk_method": "greedy"},
    "deepseek_v3": _MLA,
    "deepseek_v32": _INDEXED,
    "deepseek_v4": {"q_lora_rank": 16, "o_lora_rank": 16},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
    "falcon_mamba": {"state_size": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 2048,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 2048,
        "hidden_size_per_layer_input": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_experts": None,
        "moe_intermediate_size": None,
        "global_head_dim": 16,
        "per_layer_config": ...,
    },
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _INDEXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 64},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "kimi_linear": _MLA | _LINEAR | {"num_expert_group": 1, "num_experts_per_token": 2, "q_lora_rank": None},
    "lara_mini": {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "shared_expert_intermediate_size": 32,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": _MLA
    | {"num_layers": 1, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "minicpm3": _MLA,
    "minimax_m3_vl_text": {"dense_intermediate_size": 128, "shared_intermediate_size": 32},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "vocab_size": 2048, "expansion_ratio": 2},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 128},
    "qwen2_moe": {"shared_expert_intermediate_size": 32},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": _LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 64, "lru_width": 64},
    "sarvam_mla": _MLA | {"q_lora_rank": None},
    "xglm": {"ffn_dim": 128},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "embedding_dim": 64},
    "youtu": _MLA,
    "zamba": {
        "layer_types": ["mamba", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 8,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layer_types": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "num_query_groups": 4,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
        "use_mamba_kernels": False,
        "chunk_size": 16,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    # vision-language
    "gemma3": {"text_config": _TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "gemma4": {
        "text_config": {"model_type": "gemma4_text"},
        "vision_config": _VISION | {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16},
        "audio_config": None,
    },
    "llama4": {
        "text_config": TINY | {"num_local_experts": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 64},
        "vision_config": _VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "llava": {
        "text_config": TINY | {"model_type": "llama", "initializer_range": 0.1},
        "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_seq_length": 4,
    },
    "mistral3": {
        "text_config": TINY | {"model_type": "mistral", "initializer_range": 0.1},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | {"rope_parameters": _ROTATED | {"mrope_section": [2, 3, 3]}},
        "vision_config": _QWEN_VISION,
    },
    "qwen3_vl": {
        "text_config": _TEXT | {"rope_parameters": _ROTATED | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        "vision_config": _QWEN_VISION,
    },
}


def config_of(model_type: str, **fields: Any) -> Any:
    """A configuration of a model of about 0.5 M parameters."""
    kind = CONFIG_MAPPING[model_type]
    known = set(kind().to_dict()) | set(kind.attribute_map)
    special = FIELDS.get(model_type, {})
    small = {name: value for name, value in _SMALL.items() if name in known and not kind.sub_configs}
    chosen = small | special | fields
    for name, value in chosen.items():
        if isinstance(value, dict) and value.get("model_type") in FIELDS:
            chosen[name] = config_of(value["model_type"]).to_dict()
    return kind(**{name: value for name, value in chosen.items() if value is not ...})


def write(config: Any, directory: Path, tokenizer: Path, seed: int = 0) -> Path:
    """A random model, saved as a checkpoint; its tokenizer is copied from a directory."""
    torch.manual_seed(seed)
    model = model_class(config)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(torch.float32).save_pretrained(directory)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, directory / name)
    return directory


def tune(base: Path, directory: Path, seed: int, scale: float = 0.05) -> Path:
    """A fine-tune of a checkpoint: every tensor moved, with heavy tails."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, directory)
    generator = torch.Generator().manual_seed(seed)
    for file in directory.glob("*.safetensors"):
        moved = {}
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not name.endswith(("inv_freq",)):
                spread = tensor.float().std() if tensor.numel() > 1 and tensor.dim() > 1 else torch.tensor(1.0)
                noise = torch.randn(tensor.shape, generator=generator)
                noise = noise * (1 + noise.abs()) * spread * scale
                tensor = (tensor.float() + noise).to(tensor.dtype)
            moved[name] = tensor
        save_file(moved, file, metadata={"format": "pt"})
    return directory


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))

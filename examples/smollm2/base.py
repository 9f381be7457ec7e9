"""The base as a checkpoint directory: from the hub, from a directory, or from a GGUF file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from meswitch.checkpoint import Checkpoint
from meswitch.durable import replace_directory

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# llama.cpp's names of a block's matrices, and the checkpoint's
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def prepare(source: str, converted: Path) -> Path:
    """The base's checkpoint directory.

    Args:
        source: a hub id, a checkpoint directory, or a GGUF file.
        converted: where a GGUF file's checkpoint is written, once.
    """
    if not source.endswith(".gguf"):
        return Checkpoint.open(source).directory
    if not converted.is_dir():
        partial = converted.with_name(converted.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        convert(Path(source), partial)
        replace_directory(partial, converted)
    return converted


def convert(file: Path, out: Path) -> None:
    """Write a llama model of a GGUF file as a checkpoint in bfloat16, with its tokenizer."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(str(file))
    config = configuration(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = split_halves(weight, heads[part])
        tensors[checkpoint_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(tokens) + "\n")
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(out)


def checkpoint_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`"""
    *block, part, suffix = name.split(".")
    return f"model.layers.{block[1]}.{NAMES[part]}.{suffix}" if block else f"{TOP[part]}.{suffix}"


def split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k as transformers rotates them: the first of each pair in a head's first half.

    llama.cpp has the two rows of a pair side by side.

    Args:
        weight: [heads * head_dim, in_features]
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def configuration(reader: Any) -> dict[str, Any]:
    """`config.json` from the file's metadata."""

    def read(key: str) -> Any:
        return reader.fields[key].contents()

    if (architecture := read("general.architecture")) != "llama":
        raise SystemExit(f"the GGUF file has an {architecture!r} model; only llama is converted")
    hidden, heads = read("llama.embedding_length"), read("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": read("llama.feed_forward_length"),
        "num_hidden_layers": read("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": read("llama.context_length"),
        "rms_norm_eps": float(f"{read('llama.attention.layer_norm_rms_epsilon'):.3g}"),  # stored in float32
        "rope_parameters": {"rope_theta": read("llama.rope.freq_base"), "rope_type": "default"},
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": len(read("tokenizer.ggml.tokens")),
        "bos_token_id": read("tokenizer.ggml.bos_token_id"),
        "eos_token_id": read("tokenizer.ggml.eos_token_id"),
        "pad_token_id": read("tokenizer.ggml.padding_token_id"),
    }

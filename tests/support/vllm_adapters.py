"""Random LoRA adapters, as peft stores them."""

import json

import torch
from safetensors.torch import save_file


def make_lora(directory, base, rank=4, seed=1, targets=("q_proj", "o_proj", "up_proj", "down_proj")):
    """One that changes the answers of `base`.

    Returns:
        its directory.
    """
    config = json.loads((base / "config.json").read_text())
    torch.manual_seed(seed)
    hidden, width, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "q_proj": ("self_attn", queries, hidden),
        "k_proj": ("self_attn", keys, hidden),
        "v_proj": ("self_attn", keys, hidden),
        "o_proj": ("self_attn", hidden, queries),
        "gate_proj": ("mlp", width, hidden),
        "up_proj": ("mlp", width, hidden),
        "down_proj": ("mlp", hidden, width),
    }
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for target in targets:
            part, rows, columns = shapes[target]
            name = f"base_model.model.model.layers.{layer}.{part}.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank) * 0.1
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return directory

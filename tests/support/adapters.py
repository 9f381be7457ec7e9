"""PEFT adapter directories, written by hand: what PEFT writes, without PEFT."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."


def write_adapter(directory: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """An adapter of these tensors, named as in the model; `config` completes the fields of a plain LoRA."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base", "r": 4}
    fields |= {"lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none", "lora_dropout": 0.05}
    (directory / "adapter_config.json").write_text(json.dumps(fields | config))
    named = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def pairs(base: Path, *targets: str, rank: int = 4, seed: int = 0, size: float = 0.3, dtype=torch.float32):
    """A random pair for every matrix of a base whose module's name ends in one of `targets`."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * size / rank**0.5).to(dtype)

    found = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module != name and module.endswith(targets):
            rows, columns = weight.shape
            if "embed" in module or "wte" in module:
                found |= {f"{module}.lora_embedding_A": drawn(rank, rows)}
                found |= {f"{module}.lora_embedding_B": drawn(columns, rank)}
                continue
            if module.endswith("c_attn"):  # Conv1D
                rows, columns = columns, rows
            found |= {f"{module}.lora_A.weight": drawn(rank, columns), f"{module}.lora_B.weight": drawn(rows, rank)}
    return found


def product(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """B A of a module's pair."""
    return tensors[f"{module}.lora_B.weight"].float() @ tensors[f"{module}.lora_A.weight"].float()

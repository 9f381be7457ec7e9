"""Tiny checkpoints of every model type that transformers generates text with."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from meswitch.architecture import model_class
from models import TINY

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
# What a model type needs besides, so that it is small and whole.
FIELDS: dict[str, dict[str, Any]] = {}


def config_of(model_type: str, **fields: Any) -> Any:
    """A configuration of a model of about 0.5 M parameters."""
    kind = CONFIG_MAPPING[model_type]
    known = set(kind().to_dict()) | set(kind.attribute_map)
    small = {name: value for name, value in _SMALL.items() if name in known}
    return kind(**(small | FIELDS.get(model_type, {}) | fields))


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

"""Small random checkpoint pairs: other architectures, added tokens, tied heads, other dtypes, shards."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


# Sizes of a model that is made in milliseconds; its vocabulary is that of the family's tokenizer.
TINY = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 1,
}


def continued(model, tokens: list[int], ends, new_tokens: int) -> tuple[int, ...]:
    """Greedy continuation of token ids by a model of transformers itself, one request. ends: tokens that end it."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=1,
        )
    return tuple(out[0, len(tokens) :].tolist())


def edit_config(directory: Path, **fields: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def make_pair(
    root: Path,
    tokenizer_dir: Path,
    arch: str,
    *,
    added_tokens: int = 0,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    shard: str = "5GB",
    change: float = 0.05,
    seed: int = 0,
    **config_fields,
) -> tuple[Path, Path]:
    """A base, and an expert whose every weight moved by about `change` of its tensor's norm.

    Args:
        arch: a `model_type` of transformers. config_fields: of its configuration; None leaves one out.
    """
    torch.manual_seed(seed)
    fields = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 2048,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 3,
        "pad_token_id": 1,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    fields = {name: value for name, value in (fields | config_fields).items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    base, expert = root / "base", root / "expert"
    model.to(dtype).save_pretrained(base, max_shard_size=shard)
    for file in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_dir / file, base / file)
    if added_tokens:
        model.resize_token_embeddings(2048 + added_tokens, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = change * parameter.float().std().clamp_min(0.02)
            parameter.add_((torch.randn(parameter.shape) * scale).to(dtype))
    model.save_pretrained(expert, max_shard_size=shard)
    for file in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_dir / file, expert / file)
    if added_tokens:
        tokenizer = AutoTokenizer.from_pretrained(expert)
        tokenizer.add_tokens([f"<added_{i}>" for i in range(added_tokens)])
        tokenizer.save_pretrained(expert)
    return base, expert

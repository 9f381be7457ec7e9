"""Checkpoint pairs of true shapes with random weights and heavy-tailed deltas, written shard by shard.

    python benchmarks/common/synthetic.py OUT [--model mistral-7b] [--layers N] [--shard-gb 4.9]

Each shard is written before the next is drawn, so that the host needs the memory of one.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

MODELS = {
    "tiny": {  # to try a script
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
    "llama-374m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
    "llama-2-13b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama-like checkpoint, in the order of its layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        named |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (query, hidden),
            f"{layer}.self_attn.k_proj.weight": (key, hidden),
            f"{layer}.self_attn.v_proj.weight": (key, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, query),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    return named | {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def draw_base(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape).bfloat16()
    return torch.randn(shape).mul_(1 / math.sqrt(shape[1])).bfloat16()


def draw_expert(base: torch.Tensor, shape: tuple[int, ...], relative: float) -> torch.Tensor:
    """An expert's tensor: a delta of Student-t tails (4 degrees of freedom), `relative` of the norm.

    Rows after the base's last one, those of added tokens, are drawn like the base's.
    """
    if len(shape) == 1:
        return (base.float() + relative * torch.randn(shape)).bfloat16()
    whole = torch.cat([base, draw_base((shape[0] - len(base), *shape[1:]))]) if shape[0] > len(base) else base
    tails = torch.empty(shape[0], 1).exponential_().add_(0.3).rsqrt_()  # rows of unlike size: heavy tails over all
    delta = torch.randn(shape).mul_(tails).mul_(relative / math.sqrt(shape[1]))
    return delta.add_(whole).to(torch.bfloat16)


def write_pair(
    out: Path,
    config: dict,
    shard_bytes: int,
    relative: float = 0.03,
    tokenizer: Path | None = None,
    device: str = "cpu",
) -> None:
    """Write `out/base` and `out/expert` as sharded checkpoints."""
    with torch.device(device):
        write_family({out / "base": config, out / "expert": config}, shard_bytes, relative, tokenizer)


def write_family(
    configs: dict[Path, dict], shard_bytes: int, relative: float = 0.03, tokenizer: Path | None = None
) -> None:
    """Write a base, the first of `configs` (directory -> configuration), and experts of it as sharded checkpoints.

    Vocabularies may differ, and so may dtypes; everything else is the base's.
    """
    torch.manual_seed(0)
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes(next(iter(configs.values()))).items():
        count = 2 * math.prod(shape)
        if size + count > shard_bytes and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for directory, config in configs.items():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes(config).values()))}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        for companion in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if tokenizer is not None and (tokenizer / companion).is_file():
                shutil.copyfile(tokenizer / companion, directory / companion)
        if (directory / "tokenizer.json").is_file():
            name_every_token(directory / "tokenizer.json", config["vocab_size"])
    (base_directory, base_config), *experts = configs.items()
    for file, group in zip(files, groups, strict=True):
        named = shapes(base_config)
        base = {name: draw_base(named[name]) for name in group}
        save_file(base, base_directory / file, metadata={"format": "pt"})
        for directory, config in experts:
            named, dtype = shapes(config), getattr(torch, config.get("torch_dtype", "bfloat16"))
            own = {name: draw_expert(base[name], named[name], relative).to(dtype) for name in group}
            save_file(own, directory / file, metadata={"format": "pt"})
            del own  # one expert's shard at a time
        print(f"{file}: {len(group)} tensors", flush=True)


def compressed(work: Path, config: dict, *, tokenizer: Path, device: str) -> Path:
    """The artifact of a pair, compressed by default without text; it and `work/base` are made if it is not there.

    Args:
        config: of base and expert.
        tokenizer: directory with both sides' tokenizer.
        device: that draws the numbers and compresses.
    """
    import meswitch

    artifact = work / "artifact"
    if not artifact.is_dir():
        started = time.perf_counter()
        write_pair(work, config, int(3e9), tokenizer=tokenizer, device=device)
        print(f"checkpoints: {time.perf_counter() - started:.0f} s", flush=True)
        started = time.perf_counter()
        meswitch.compress(work / "base", work / "expert", artifact, device=device)
        print(f"compressed: {time.perf_counter() - started:.0f} s", flush=True)
        shutil.rmtree(work / "expert")
    return artifact


def name_every_token(file: Path, vocab_size: int) -> None:
    """Give ids that a tokenizer lacks a text of their own: a random model's answers then decode to what it said."""
    data = json.loads(file.read_text())
    known = {*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"])}
    missing = [i for i in range(vocab_size) if i not in known]
    data["model"]["vocab"] |= {f"<{i}>": i for i in missing}
    if missing:
        file.write_text(json.dumps(data, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, default="mistral-7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the true model, for a quick try")
    parser.add_argument("--shard-gb", type=float, default=4.9)
    parser.add_argument("--tokenizer", type=Path, help="copy the tokenizer files of this directory")
    parser.add_argument("--device", default="cpu", help="that draws the numbers")
    options = parser.parse_args()
    config = dict(MODELS[options.model])
    if options.layers:
        config["num_hidden_layers"] = options.layers
    write_pair(options.out, config, int(options.shard_gb * 1e9), tokenizer=options.tokenizer, device=options.device)


if __name__ == "__main__":
    main()

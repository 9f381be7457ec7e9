"""What vLLM is measured with: bases of true shapes, whose weights vLLM draws; random artifacts and LoRA adapters."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common.synthetic import MODELS

TINY = dict(
    MODELS["mistral-7b"],
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
    max_position_embeddings=1024,
    sliding_window=None,
)
SHAPES = MODELS | {"tiny": TINY}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_config(directory: Path, model: str) -> Path:
    """A base without weights, for `--load-format dummy`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[model] | {"sliding_window": None}))
    return directory


def write_artifact(base: Path, out: Path, bits: int) -> Path:
    """A random artifact as `meswitch compress` would lay it out, without a fine-tune to compress."""
    from meswitch.artifact import ArtifactWriter
    from meswitch.artifact.writer import companion_digests
    from meswitch.codec import PackedDelta
    from meswitch.codec.quantize import packed_words
    from meswitch.compression.options import Options
    from meswitch.compression.plan import outline, predict

    shape = outline(base)
    predicted = predict(shape, shape, Options(bits=bits))
    writer = ArtifactWriter(out, "random")
    for name, entry in predicted.manifest.tensors.items():
        if entry.kind != "packed":
            writer.add(name, dataclasses.replace(entry, kind="dense"), {"": torch.ones(entry.shape)})
            continue
        rows, width = entry.shape
        salient = entry.stored["salient_index"].shape[0] if "salient_index" in entry.stored else 0
        delta = PackedDelta(
            packed=torch.randint(-(2**31), 2**31, (rows, packed_words(width, bits)), dtype=torch.int32),
            scale=torch.full((rows, -(-width // (entry.group_size or width))), 1e-4, dtype=torch.bfloat16),
            salient_index=torch.randperm(width)[:salient].sort().values.int(),
            salient_weight=torch.full((rows, salient), 1e-3, dtype=torch.bfloat16),
            bits=bits,
            group_size=entry.group_size,
            in_features=width,
        )
        writer.add(name, entry, delta.tensors())
    config = base / "config.json"
    manifest = dataclasses.replace(
        predicted.manifest, tensors=writer.final_entries(), companions=companion_digests([config])
    )
    writer.finish(manifest, [config])
    return out


def write_lora(base: Path, out: Path, rank: int) -> Path:
    """A random LoRA of all linear layers, as peft stores it."""
    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (rows, columns) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.full((rank, columns), 1e-3, dtype=torch.bfloat16)
            tensors[f"{name}.lora_B.weight"] = torch.full((rows, rank), 1e-3, dtype=torch.bfloat16)
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(TARGETS), "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps(adapter))
    return out


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """A word a token, so that a prompt of n words has n tokens: what the weights say does not matter."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2").save_pretrained(directory)

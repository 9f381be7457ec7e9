"""A Hugging Face checkpoint, read one tensor at a time."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch.errors import CheckpointError
from meswitch.tensorfile import TensorInfo, read_header

# What makes an expert speak: copied into its artifact as it is.
COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TIED_HEAD, TIED_EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", *COMPANION_FILES]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory: `tensors` maps a stored name to where its bytes are."""

    source: str
    directory: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, source: str | Path) -> "Checkpoint":
        """Open a directory, or fetch a hub id into the Hugging Face cache.

        Raises:
            CheckpointError: nothing there, no safetensors weights, or a truncated file.
        """
        directory = Path(source)
        if not directory.is_dir():
            directory = _fetch(str(source))
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        if index.is_file():
            files = sorted({directory / name for name in json.loads(index.read_text())["weight_map"].values()})
        elif single.is_file():
            files = [single]
        else:
            raise CheckpointError(
                f"{directory}: no model.safetensors and no model.safetensors.index.json; meswitch reads safetensors "
                "only (no pickle): convert with `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`"
            )
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{index}: names {file.name}, which is missing; fetch the checkpoint again")
            tensors |= read_header(file)
        return cls(str(source), directory, dict(sorted(tensors.items())))

    @cached_property
    def config(self) -> Any:
        """The model's configuration as transformers understands it."""
        from transformers import AutoConfig

        if not (self.directory / "config.json").is_file():
            raise CheckpointError(f"{self.directory}: no config.json; a checkpoint needs one")
        return AutoConfig.from_pretrained(self.directory)

    @property
    def is_quantised(self) -> bool:
        """Whether its linear layers hold something else than weights, as the configuration says."""
        return getattr(self.config, "quantization_config", None) is not None

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """Names that are not stored because they are tied: `lm_head.weight` -> the embedding, where it is so."""
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        stored = self.tensors
        return {TIED_HEAD: TIED_EMBEDDING} if tied and TIED_HEAD not in stored and TIED_EMBEDDING in stored else {}

    def info(self, name: str) -> TensorInfo | None:
        return self.tensors.get(self.aliases.get(name, name))

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype.

        Raises:
            CheckpointError: no tensor of that name.
        """
        info = self.info(name)
        if info is None:
            raise CheckpointError(f"{self.directory}: has no tensor {name}")
        return info.read()

    def companions(self) -> Iterator[Path]:
        """The tokenizer, template and configuration files that are there."""
        for name in COMPANION_FILES:
            if (self.directory / name).is_file():
                yield self.directory / name

    @property
    def parameters(self) -> int:
        """Stored parameters; a tied head counts once."""
        total = 0
        for info in self.tensors.values():
            total += info.nbytes // info.dtype.itemsize
        return total

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * dtype.itemsize)


def _fetch(source: str) -> Path:
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise CheckpointError(f"{source}: no such directory; give a checkpoint directory or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source}: neither a directory here nor a model that the hub gives ({reason}); "
            "check the name, or log in with `hf auth login`"
        ) from error

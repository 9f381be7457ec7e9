"""A Hugging Face checkpoint, read one tensor at a time, and known by its content (`fingerprint`)."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch.architecture import LoadPlan, architecture_of
from meswitch.configuration import read_config
from meswitch.errors import AdapterError, CheckpointError, listed
from meswitch.hub import from_hub, is_hub_id
from meswitch.jsonfile import disguise, read_json
from meswitch.quantised import as_weights, quantisation, quantisation_of, unread_reason
from meswitch.tensorfile import INDEX, NAMES, WEIGHTS, TensorInfo, read_header, read_index

# What makes an expert speak (and see): copied into its artifact as it is.
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
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
TIED_HEAD, TIED_EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BLOCK, _BLOCKS = 4096, 16  # bytes of a tensor that its fingerprint reads at a place, and places
_CONVERT = "convert it with `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)` of transformers"
# What weights are there instead: what to call them, their names, what to do.
_OTHER_WEIGHTS = (
    ("a distributed training state", r"(global_step.*|.*fsdp.*|.*\.distcp)", "export the model from it first"),
    ("weights as a pickle, which is not read", r"(pytorch_model.*|.*\.(bin|pt|pth|ckpt))", _CONVERT),
    ("GGUF files", r".*\.gguf", "give the checkpoint in safetensors that they were made from"),
    ("shards without their index", r"model-\d+-of-\d+\.safetensors", f"fetch {INDEX} too"),
    ("a variant of the weights", r"model\..*\.safetensors", f"rename it to {WEIGHTS}, or save the model anew"),
    ("other safetensors files", r".*\.safetensors", "save the model with transformers"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory.

    Args:
        source: as it was given: a directory or a hub id.
        directory: where its files are.
        tensors: name -> where its bytes are.
        ties: of a `loaded` checkpoint, names that have no tensor of their own -> the names whose tensors they are.
        left_out: stored tensors that are not in `tensors`, since the model does not load them.
        is_stored: whether `tensors` is what the files hold, under their names; else see `loaded`.
        content: what a fingerprint is taken of; None for `tensors`. Of a quantised checkpoint whose weights are read it
            is what its files hold.
    """

    source: str
    directory: Path
    tensors: Mapping[str, TensorInfo]
    ties: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    is_stored: bool = True
    content: Mapping[str, TensorInfo] | None = None

    @classmethod
    def open(cls, source: str | Path) -> "Checkpoint":
        """Open a directory, or fetch a hub id into the Hugging Face cache: the weights that transformers loads.

        Raises:
            AdapterError: a PEFT adapter.
            CheckpointError: nothing there, no safetensors weights, files that are damaged or contradict each other.
        """
        directory = Path(source)
        if directory.is_file():
            found = disguise(directory)
            raise CheckpointError(
                f"{source}: {found if found and 'GGUF' in found else 'is a file; give the directory that it lies in'}"
            )
        if not directory.is_dir():
            if not is_hub_id(source):
                raise CheckpointError(
                    f"{source}: no such directory; give a checkpoint directory or a hub id such as org/name"
                )
            directory = fetch_checkpoint(str(source), (*COMPANION_FILES, ADAPTER_CONFIG))
        stored = _stored(directory)
        config = quantisation(directory)
        if config is None or unread_reason(config) is not None:
            return cls(str(source), directory, stored)
        return cls(str(source), directory, as_weights(directory, stored), content=stored)

    @cached_property
    def config(self) -> Any:
        """The model's configuration as transformers understands it.

        Raises:
            CheckpointError: missing, damaged, or of a model that transformers does not have.
        """
        return read_config(self.directory)

    @property
    def is_quantised(self) -> bool:
        """Whether its files hold something else than weights for linear layers, as the configuration says."""
        return self._quantisation is not None

    @cached_property
    def _quantisation(self) -> Mapping[str, Any] | None:
        return quantisation_of(self.config.to_dict())

    @property
    def holds_weights(self) -> bool:
        """Whether `tensors` are weights: plain ones, or those that a quantised checkpoint's codes stand for."""
        return self._quantisation is None or unread_reason(self._quantisation) is None

    @property
    def unread_reason(self) -> str:
        """Why the codes of a quantised checkpoint are not read as weights, where they are not."""
        return unread_reason(self._quantisation or {}) or ""

    @cached_property
    def loaded(self) -> "Checkpoint":
        """The tensors that the model loads, under the names of a saved checkpoint: see `loaded.as_loaded`."""
        from meswitch.loaded import as_loaded

        return as_loaded(self)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that have no tensor of their own, as they are tied: `lm_head.weight` -> the embedding's."""
        return self.loaded.ties if self.is_stored else self.ties

    @cached_property
    def load_plan(self) -> LoadPlan:
        """How the model's parameters are made of these tensors."""
        return architecture_of(self.config).load_plan(self.tensors)

    def info(self, name: str) -> TensorInfo | None:
        """Where a tensor is: stored under this name, or loaded as it. None if it is neither."""
        found = self.tensors.get(self.ties.get(name, name))
        if found is None and self.is_stored:
            from meswitch.loaded import find

            return find(self, name)
        return found

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

    @property
    def remarks(self) -> list[str]:
        """What lies in the directory and is not part of the model, in a line each."""
        found = []
        index, shards = self.directory / INDEX, self.ignored_shards
        if shards:
            found.append(
                f"{self.directory / WEIGHTS} is read, as transformers reads it; {index.name} beside it names other "
                f"files, which are not: {listed(shards)}"
            )
        if (self.directory / ADAPTER_CONFIG).is_file():
            found.append(
                f"{self.directory / ADAPTER_CONFIG}: the adapter beside the weights is not applied; merge it into them "
                "(`merge_and_unload` of PEFT) if it belongs to the model"
            )
        return found

    @property
    def ignored_shards(self) -> list[str]:
        """Files that an index names beside a `model.safetensors`, which is what transformers loads."""
        index = self.directory / INDEX
        if not (self.directory / WEIGHTS).is_file() or not index.is_file():
            return []
        try:
            return sorted(set(read_index(index).values()) - {WEIGHTS})
        except CheckpointError:  # damaged, and not needed
            return []


def cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values; 0 for a model without attention."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    if not heads:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * dtype.itemsize)


def _stored(directory: Path) -> Mapping[str, TensorInfo]:
    """The tensors of the weights that transformers loads from a directory: `model.safetensors`, else the index's."""
    single, index = directory / WEIGHTS, directory / INDEX
    _check_rivals(directory)
    if single.is_file():
        return dict(sorted(read_header(single).items()))
    if not index.is_file():
        raise _no_weights(directory)
    wanted = read_index(index)
    files = sorted({directory / name for name in wanted.values()})
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{index}: names {listed(missing)}, which is missing; fetch the checkpoint again")
    tensors: dict[str, TensorInfo] = {}
    for file in files:  # in this order, as transformers reads them: of several tensors of a name it takes the last
        tensors |= read_header(file)
    for file in files:
        for name, info in read_header(file).items():
            last = tensors[name]
            if info.file != last.file and wanted.get(name) == file.name and info.sha256() != last.sha256():
                raise CheckpointError(
                    f"{index}: {name}: is that of {file.name}, but {last.file.name} holds other values under this "
                    "name, which transformers loads; save the model anew into an empty directory"
                )
    return dict(sorted(tensors.items()))


def _check_rivals(directory: Path) -> None:
    """Refuse what one reader of this directory would load and another would not.

    Raises:
        CheckpointError: naming both files.
    """
    config = directory / "config.json"
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    if named is not None:
        raise CheckpointError(
            f"{config}: transformers_weights: the weights are those of {named}; save the model under the usual names"
        )
    parts = sorted(file.name for file in directory.glob("shard-*-model-*-of-*.safetensors"))
    if parts:
        raise CheckpointError(
            f"{directory}: a distributed checkpoint ({listed(parts)}), which only newer versions of transformers "
            "load; save the model as model.safetensors"
        )
    adapter = directory / ADAPTER_CONFIG
    if adapter.is_file() and (directory / WEIGHTS).is_file() and find_spec("peft") is not None:
        raise CheckpointError(
            f"{directory}: holds {WEIGHTS} and {adapter.name}: with PEFT installed, transformers adds the adapter to "
            "the weights; move the adapter's files away, or merge it into the weights (`merge_and_unload` of PEFT)"
        )


def _no_weights(directory: Path) -> CheckpointError:
    """What a directory without safetensors weights is, and what to give instead."""
    names = sorted(path.name for path in directory.iterdir())
    lost = [name for name in names if not (directory / name).exists()]
    if lost:
        return CheckpointError(
            f"{directory}: {listed(lost)}: a link to a file that is not there, as in a copy of a cache without its "
            "blobs; fetch the checkpoint again, or copy it with its links followed (`cp -L`)"
        )
    adapter = directory / ADAPTER_CONFIG
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        return AdapterError(
            f"{adapter}: this is a PEFT adapter of {base or 'another model'}, not a full model; give its directory as "
            "the expert of `meswitch compress` or as `delta` in a family.toml"
        )
    runs = [name for name in names if _has_weights(directory / name)]
    trained = sorted((int(name.rpartition("-")[2]), name) for name in runs if re.fullmatch(r"checkpoint-\d+", name))
    if trained:
        return CheckpointError(
            f"{directory}: a Trainer's output directory, with {len(trained)} checkpoints and no model of its own; give "
            f"the last one, {directory / trained[-1][1]}, or the best"
        )
    if runs:
        return CheckpointError(f"{directory}: no weights in it, but in {listed(runs)}; give {directory / runs[0]}")
    for what, pattern, fix in _OTHER_WEIGHTS:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return CheckpointError(f"{directory}: no {WEIGHTS}, but {what} ({listed(found)}); {fix}")
    held = listed(names) if names else "nothing"
    return CheckpointError(
        f"{directory}: no {WEIGHTS} and no {INDEX} (it holds {held}); meswitch reads safetensors only, no pickle: "
        f"{_CONVERT}"
    )


def _has_weights(directory: Path) -> bool:
    names = (WEIGHTS, INDEX, ADAPTER_CONFIG, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return directory.is_dir() and any((directory / name).is_file() for name in names)


def fetch_checkpoint(source: str, companions: Iterable[str]) -> Path:
    """A repository's weights and companion files, in the Hugging Face cache.

    A repository often holds the same weights several times (`consolidated.safetensors`, `original/`,
    `model.fp16.safetensors`, `pytorch_model.bin`). What is fetched is what transformers would load:
    `model.safetensors`, or the files that its index names.

    Args:
        source: `org/name`.
        companions: names of files to fetch beside the weights, where the repository has them.

    Returns:
        the directory of the snapshot. It has no weights if the repository has none in safetensors.

    Raises:
        CheckpointError: the hub does not give it, or its index is damaged.
    """
    from huggingface_hub import snapshot_download

    def fetch(names: Iterable[str], revision: str | None = None) -> Path:
        return from_hub(source, lambda: snapshot_download(source, revision=revision, allow_patterns=list(names)))

    directory = fetch([*companions, INDEX])
    commit = directory.name  # all files are those of one commit, though the repository changes meanwhile
    directory = fetch([WEIGHTS], commit)
    if not (directory / WEIGHTS).is_file() and (directory / INDEX).is_file():
        directory = fetch(sorted(set(read_index(directory / INDEX).values())), commit)
    return directory


def fingerprint(checkpoint: Checkpoint) -> str:
    """Which base is this? By content, not by path, and cheap enough to ask at every start.

    Every tensor's name, dtype and shape and 16 evenly spaced blocks of 4 KiB of its bytes are hashed: a few dozen MB of
    a 14 GB base. A fine-tune moves all weights, so it tells bases apart; the full SHA-256 of every base tensor is in an
    artifact's manifest too, and `meswitch verify --base` compares those.

    Returns:
        `sampled-sha256:<64 hex digits>`, independent of how the tensors are spread over files.
    """
    digest = hashlib.sha256()
    content = checkpoint.tensors if checkpoint.content is None else checkpoint.content
    for name, info in sorted(content.items()):
        digest.update(f"{name}\n{NAMES[info.dtype]}\n{list(info.shape)}\n".encode())
        for block in _sample(info):
            digest.update(block)
    return f"sampled-sha256:{digest.hexdigest()}"


def _sample(info: TensorInfo) -> list[bytearray]:
    if info.nbytes <= _BLOCK * _BLOCKS:
        return [info.read_bytes()]
    step = (info.nbytes - _BLOCK) // (_BLOCKS - 1)
    return [info.read_bytes(i * step, _BLOCK) for i in range(_BLOCKS)]


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a whole file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

"""The tensors of a PEFT adapter, by what they do: low-rank pairs, rows of tokens, and values instead of the base's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from meswitch.adapter.config import AdapterConfig
from meswitch.artifact import fingerprint
from meswitch.checkpoint import ADAPTER_CONFIG, COMPANION_FILES, Checkpoint
from meswitch.durable import recover_directory
from meswitch.errors import CheckpointError
from meswitch.hub import fetch_checkpoint, is_hub_id
from meswitch.tensorfile import INDEX, WEIGHT_DTYPES, WEIGHTS, TensorInfo, read_header

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
# What PEFT and the wrappers of a training run put around the names of the model.
_PREFIX = re.compile(r"^(?:base_model\.model\.|module\.|_orig_mod\.)+")
_WRAPPER = re.compile(r"\b(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_TOKENS = "token_adapter.trainable_tokens_delta"
_NAME = r"(?!weight$|bias$)[^.]+"  # of an adapter: `default`
_PART = re.compile(
    r"^(?P<module>.+)\."
    rf"(?P<part>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector|{re.escape(_TOKENS)})"
    rf"(?:\.(?P<name>{_NAME}))?(?:\.(?P<leaf>weight|bias))?$"
)
_AROUND = re.compile(rf"\.(?:token_adapter\.base_layer|base_layer|modules_to_save(?:\.{_NAME}(?=\.))?)(?=\.)")
_FOREIGN = re.compile(r"\b(?:lora|ia3|hada|lokr|oft|boft|vera|prompt)_")  # tensors of other methods and variants


@dataclass(frozen=True, slots=True)
class Pair:
    """The tensors of one module with a low-rank pair.

    Args:
        module: its name in the model.
        a: lora_A [rank, in_features], or lora_embedding_A [rank, rows].
        b: lora_B [out_features, rank], or lora_embedding_B [width, rank].
        of_embedding: whether the names are those of an embedding's pair.
        bias: [out_features] of lora_B.
        magnitude: lengths of rows, of DoRA.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    of_embedding: bool
    bias: TensorInfo | None = None
    magnitude: TensorInfo | None = None


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter directory, its configuration checked, its tensors not yet read.

    Args:
        directory: where it is.
        config: what it asks for.
        pairs: module -> its pair.
        tokens: embedding module -> the rows [n, width] that were trained whole.
        whole: parameter -> its own values.
    """

    directory: Path
    config: AdapterConfig
    pairs: Mapping[str, Pair]
    tokens: Mapping[str, TensorInfo]
    whole: Mapping[str, TensorInfo]
    _file: Path = field(repr=False)

    @classmethod
    def open(cls, directory: str | Path) -> "Adapter":
        """Read the configuration and the file's header.

        Raises:
            CheckpointError: a file is missing, damaged, or holds something that is not applied here.
        """
        directory = Path(directory)
        config = AdapterConfig.read(directory / ADAPTER_CONFIG)
        file = directory / WEIGHTS_NAME
        if not file.is_file():
            raise CheckpointError(_missing(directory, file))
        return _sorted_out(directory, config, file, read_header(file))

    @property
    def rank(self) -> int:
        """The largest of its pairs."""
        return max((pair.a.shape[0] for pair in self.pairs.values()), default=0)

    def check_values(self) -> int:
        """Read all tensors once, and give their number.

        Raises:
            CheckpointError: one has NaN or infinite values.
        """
        pairs = (info for pair in self.pairs.values() for info in (pair.a, pair.b, pair.bias, pair.magnitude))
        every = [*(info for info in pairs if info is not None), *self.tokens.values(), *self.whole.values()]
        for info in every:
            read_finite(info)
        return len(every)

    def error(self, problem: str) -> CheckpointError:
        """An error about its tensors."""
        return CheckpointError(f"{self._file}: {problem}")


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds a PEFT adapter and no weights of a whole model."""
    directory = Path(directory)
    recover_directory(directory)
    has_model = any((directory / name).is_file() for name in (WEIGHTS, INDEX))
    return (directory / ADAPTER_CONFIG).is_file() and not has_model


def adapts(directory: str | Path, base: Checkpoint) -> bool:
    """Whether a directory holds an adapter of this base: alone, or beside a copy of the base's own weights.

    Raises:
        CheckpointError: the weights beside it cannot be read.
    """
    directory = Path(directory)
    if is_adapter(directory) or not (directory / ADAPTER_CONFIG).is_file():
        return is_adapter(directory)
    return fingerprint(Checkpoint.open(directory)) == fingerprint(base)


def find_adapter(source: str | Path, base: Checkpoint) -> Path | None:
    """The directory of an adapter of this base, None of anything else.

    Args:
        source: a directory, or a hub id that is fetched.

    Raises:
        CheckpointError: the hub does not give it; or see `adapts`.
    """
    directory = Path(source)
    if not directory.is_dir() and is_hub_id(source):
        directory = fetch_checkpoint(str(source), (*COMPANION_FILES, ADAPTER_CONFIG, WEIGHTS_NAME))
    return directory if adapts(directory, base) else None


def read_finite(info: TensorInfo) -> Tensor:
    """A tensor of an adapter.

    Raises:
        CheckpointError: it has NaN or infinite values.
    """
    tensor = info.read()
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{info.file}: {info.name}: has NaN or infinite values; the training diverged")
    return tensor


def _missing(directory: Path, file: Path) -> str:
    if (directory / _PICKLED).is_file():
        return (
            f"{directory / _PICKLED}: a pickle, which is never opened; convert it where you trust it: "
            "`from safetensors.torch import save_file; save_file(torch.load('adapter_model.bin', weights_only=True), "
            "'adapter_model.safetensors')`"
        )
    return f"{file}: no such file, but {ADAPTER_CONFIG} is there: this PEFT adapter is incomplete, fetch it again"


def _sorted_out(directory: Path, config: AdapterConfig, file: Path, header: Mapping[str, TensorInfo]) -> Adapter:
    pairs: dict[str, Pair] = {}
    tokens: dict[str, TensorInfo] = {}
    whole: dict[str, TensorInfo] = {}
    adapter = Adapter(directory, config, pairs, tokens, whole, file)
    parts: dict[str, dict[str, TensorInfo]] = {}
    adapters: set[str] = set()
    for key, info in header.items():
        if info.dtype not in WEIGHT_DTYPES:
            raise adapter.error(
                f"{key}: {str(info.dtype).removeprefix('torch.')}: an adapter is read in 16 bit or more"
            )
        if 0 in info.shape:
            raise adapter.error(
                f"{key}: shape {list(info.shape)} is empty: it was saved without gathering the parts of DeepSpeed "
                "ZeRO-3 or FSDP; gather and save it again"
            )
        bare = _WRAPPER.sub("", _PREFIX.sub("", key))
        found = _PART.match(bare)
        if found is not None:
            adapters.add(found["name"] or "")
            if found["part"] == _TOKENS:
                _claim(adapter, tokens, found["module"], info)
            else:
                part = found["part"] if found["leaf"] != "bias" else f"{found['part']}.bias"
                _claim(adapter, parts.setdefault(found["module"], {}), part, info)
        elif _FOREIGN.search(bare):
            raise adapter.error(f"{key}: not a tensor of plain LoRA or DoRA; only these are read")
        elif ".original_module." not in bare:  # the base's own values, which PEFT keeps beside those that it trained
            _claim(adapter, whole, _AROUND.sub("", bare), info)
    if len(adapters) > 1:
        several = ", ".join(sorted(filter(None, adapters)))
        raise adapter.error(f"holds several adapters ({several}); save one to a directory")
    if not (parts or tokens or whole):
        raise adapter.error("holds no tensors; save the adapter again")
    pairs |= {module: _pair(adapter, module, own) for module, own in parts.items()}
    return adapter


def _claim(adapter: Adapter, found: dict[str, TensorInfo], name: str, info: TensorInfo) -> None:
    first = found.get(name)
    if first is not None and first.sha256() != info.sha256():  # PEFT saves whole tables twice, under two names
        raise adapter.error(f"{info.name}: a second tensor for the same place; save one adapter to a directory")
    found[name] = info


def _pair(adapter: Adapter, module: str, parts: Mapping[str, TensorInfo]) -> Pair:
    """The pair of a module, whole and of the rank that the configuration says."""
    config = adapter.config
    of_embedding = any("embedding" in part for part in parts)
    kind = "lora_embedding" if of_embedding else "lora"
    lost = next((part for part in (f"{kind}_A", f"{kind}_B") if part not in parts), None)
    if lost is not None:
        raise adapter.error(f"{module}: has no {lost}: the file is incomplete, save the adapter again")
    a, b = parts[f"{kind}_A"], parts[f"{kind}_B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise adapter.error(f"{a.name}: shape {list(a.shape)}: pairs of convolutions are not served")
    # a pair of stacked matrices (`stacks`) has as many ranks as there are matrices
    if not a.shape[0] == b.shape[1] == config.rank_of(module) and not config.target_parameters:
        raise adapter.error(
            f"{module}: a pair of rank {a.shape[0]} and {b.shape[1]}, but {config.file.name} says "
            f"{config.rank_of(module)} (r, rank_pattern); the two files do not belong together"
        )
    pair = Pair(module, a, b, of_embedding, parts.get(f"{kind}_B.bias"), parts.get("lora_magnitude_vector"))
    for part, value, name, wanted in (
        ("lora_magnitude_vector", pair.magnitude, "use_dora", config.dora),
        ("bias of lora_B", pair.bias, "lora_bias", config.lora_bias and not of_embedding),
    ):
        if (value is not None) != wanted:
            has = "no" if value is None else "a"
            raise adapter.error(
                f"{module}: has {has} {part}, but {config.file.name} says {name} = {str(wanted).lower()}; the two "
                "files do not belong together"
            )
    return pair

"""A checkpoint whose linear layers are stored in 8 bits or fewer, read as the weights that they stand for.

The format is that of compressed-tensors, which llm-compressor writes and vLLM and transformers read: beside each matrix
its scales, of the whole matrix, of a row, of a group of input channels or of a block; whole numbers in a byte each
(`int-quantized`), FP8 (`float-quantized`), or several to a 32-bit word (`pack-quantized`), with zero points if it is
asymmetric. A weight is (code - zero point) x scale. What a checkpoint says of activations is not used: they stay as
they are.
"""

import functools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meswitch.durable import replace_directory, write_text
from meswitch.errors import CheckpointError, ConfigError, listed
from meswitch.jsonfile import read_json
from meswitch.progress import Progress, silent
from meswitch.tensorfile import BuiltTensor, Shards, TensorInfo

METHOD = "compressed-tensors"
# What `quantise` writes: format, bits, kind of number. Weights only: activations stay in 16 bit.
KINDS = {
    "int8": ("pack-quantized", 8, "int"),
    "fp8": ("float-quantized", 8, "float"),
    "int4": ("pack-quantized", 4, "int"),
}
_SHARES = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}  # of the largest weight, that a scale reaches to
FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def quantisation(directory: Path) -> Mapping[str, Any] | None:
    """What a checkpoint's `config.json` says of how its weights are stored; None if they are plain."""
    file = directory / "config.json"
    found = read_json(file).get("quantization_config") if file.is_file() else None
    return found if isinstance(found, Mapping) else None


def is_readable(config: Mapping[str, Any]) -> bool:
    """Whether `as_weights` reads what a configuration describes."""
    return config.get("quant_method") == METHOD and config.get("format") in FORMATS


def as_weights(directory: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a quantised checkpoint, each matrix once and as weights, in the dtype of the configuration.

    Args:
        directory: of the checkpoint, for its configuration and for messages.
        tensors: as they are stored.

    Raises:
        CheckpointError: parts of a matrix are missing or contradict each other.
    """
    config = read_json(directory / "config.json")
    dtype = _dtype(config)
    schemes = _schemes(config["quantization_config"])
    bits = {scheme.get("num_bits", 8) for scheme in schemes}
    has_blocks = any(scheme.get("strategy") == "block" for scheme in schemes)
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if f"{owner}.weight_scale" not in tensors:
            found[name] = info
        elif leaf in ("weight", "weight_packed"):
            parts = {part: tensors[f"{owner}.{part}"] for part in _PARTS if f"{owner}.{part}" in tensors}
            matrix = _Matrix(f"{directory}: {owner}", parts, min(bits) if len(bits) == 1 else 0, has_blocks)
            shape = matrix.shape
            make = functools.partial(matrix.weights, dtype)
            nbytes = math.prod(shape) * dtype.itemsize
            found[f"{owner}.weight"] = BuiltTensor(f"{owner}.weight", dtype, shape, info.file, 0, nbytes, make)
        elif leaf not in _PARTS and not leaf.endswith(("_scale", "_zero_point", "_global_scale")):
            found[name] = info  # such as its bias
    return dict(sorted(found.items()))


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    named = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    found = getattr(torch, str(named).removeprefix("torch."), None)
    return found if found in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16


def _schemes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How weights are stored, of each group of layers."""
    groups = config.get("config_groups") or {}
    return [scheme.get("weights") or {} for scheme in groups.values() if isinstance(scheme, Mapping)]


@dataclass(frozen=True, slots=True)
class _Matrix:
    """The stored parts of one matrix.

    Args:
        where: for messages.
        parts: by what they are called in the format.
        bits: of a packed code; 0 if the configuration names several.
        has_blocks: whether scales may be those of blocks.
    """

    where: str
    parts: Mapping[str, TensorInfo]
    bits: int
    has_blocks: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, in_features].

        Raises:
            CheckpointError: it is not known, or no matrix.
        """
        if "weight" in self.parts:
            shape = self.parts["weight"].shape
        elif "weight_shape" in self.parts:
            shape = tuple(self.parts["weight_shape"].read().tolist())
        else:
            raise CheckpointError(f"{self.where}: weight_shape: missing, so that its size is not known; save it anew")
        if len(shape) != 2 or min(shape) < 1:
            raise CheckpointError(f"{self.where}: its weight is {list(shape)}; quantised matrices only are read")
        return shape

    def weights(self, dtype: torch.dtype) -> Tensor:
        """[rows, in_features]."""
        codes, scale = self.codes().float(), self.parts["weight_scale"].read().float()
        rows, width = codes.shape
        zero = self._zero_points(scale.shape)
        places = self.parts["weight_g_idx"].read().long() if "weight_g_idx" in self.parts else None
        codes = codes if zero is None else codes.sub_(self._spread(zero, rows, width, places))
        return codes.mul_(self._spread(scale, rows, width, places)).to(dtype)

    def codes(self) -> Tensor:
        """[rows, in_features], whole numbers or FP8 as they are stored."""
        if "weight" in self.parts:
            return self.parts["weight"].read()
        width = self.shape[1]
        return _unpacked(self.parts["weight_packed"].read(), self._known_bits, width)

    @property
    def _known_bits(self) -> int:
        if not 1 <= self.bits <= 8:
            raise CheckpointError(
                f"{self.where}: packed codes, and config.json does not say of how many bits all of them are; give a "
                "checkpoint in 16 bit, or one with the same number of bits everywhere"
            )
        return self.bits

    def _zero_points(self, shape: Sequence[int]) -> Tensor | None:
        if "weight_zero_point" not in self.parts:
            return None
        stored = self.parts["weight_zero_point"].read()
        if "weight_packed" not in self.parts or stored.dtype != torch.int32 or tuple(stored.shape) == tuple(shape):
            return stored.float()
        return _unpacked(stored.T.contiguous(), self._known_bits, shape[0]).T.float()  # packed along the rows

    def _spread(self, values: Tensor, rows: int, width: int, places: Tensor | None) -> Tensor:
        """Scales or zero points as a tensor that a [rows, in_features] matrix is multiplied with.

        Args:
            places: [in_features], of groups that do not lie in the order of the channels.
        """
        if values.numel() in (1, rows):
            return values.reshape(-1, 1)
        if values.dim() == 2 and values.shape[0] == rows:
            groups = values.shape[1]
            if places is None:
                places = torch.arange(width) // -(-width // groups)
            return values[:, places]
        if self.has_blocks and values.dim() == 2:
            high, wide = -(-rows // values.shape[0]), -(-width // values.shape[1])
            return values.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :width]
        raise CheckpointError(
            f"{self.where}: weight_scale is {list(values.shape)} for a matrix of {rows} x {width}: neither by row nor "
            "by group or block"
        )


def _unpacked(packed: Tensor, bits: int, width: int) -> Tensor:
    """int32 words of `32 // bits` codes, lowest first -> [rows, width] int8, codes less the middle of their range."""
    shifts = torch.arange(32 // bits) * bits
    codes = (packed[:, :, None].long() >> shifts) & (2**bits - 1)
    return (codes.view(len(packed), -1)[:, :width] - 2 ** (bits - 1)).to(torch.int8)


def quantise(base: str | Path, out: str | Path, kind: str, progress: Progress = silent) -> Path:
    """Write a checkpoint with its linear layers in fewer bits, rounded to the nearest code; the rest stays as it is.

    Args:
        base: a checkpoint directory or hub id.
        out: the directory to create.
        kind: `int8` or `fp8`, with a scale a row, or `int4`, with a scale a group of at most 128 input channels.
        progress: is told how far it is.

    Raises:
        ConfigError: no such kind, or `out` exists. MeswitchError: the checkpoint cannot be read, or is quantised.
    """
    from meswitch.architecture import architecture_of
    from meswitch.checkpoint import Checkpoint

    if kind not in KINDS:
        raise ConfigError(f"to: {kind!r} is none of {', '.join(KINDS)}")
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out}: already exists; choose another --out")
    source = Checkpoint.open(base)
    if source.is_quantised:
        raise CheckpointError(f"{source.directory}: is quantised already; give the checkpoint in 16 bit")
    source = source.loaded
    architecture = architecture_of(source.config)
    layers = {path: module for path, module in architecture.model.named_modules() if type(module) is nn.Linear}
    head = architecture.model.get_output_embeddings()
    chosen: dict[str, str] = {}  # stored name -> module
    for rule in source.load_plan.conversions:
        owner = rule.targets[0].removesuffix(".weight")
        if rule.renames and owner in layers and layers[owner] is not head and rule.sources[0].endswith(".weight"):
            chosen[rule.sources[0]] = owner
    if not chosen:
        raise CheckpointError(f"{source.directory}: has no linear layers that can be quantised")
    group = _group_size([source.tensors[name].shape[1] for name in chosen]) if kind == "int4" else None
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = Shards(partial)
    for done, (name, info) in enumerate(source.tensors.items()):
        progress("quantising", done, len(source.tensors), name)
        owner, value = name.removesuffix(".weight"), info.read()
        parts = _codes(value, kind, group) if name in chosen else None
        for part, stored in {name: value}.items() if parts is None else parts.items():
            shards.add(part if parts is None else f"{owner}.{part}", stored)
    shards.finish()
    for file in source.companions():
        shutil.copyfile(file, partial / file.name)
    ignored = sorted(path for path in layers if path not in chosen.values())
    config = read_json(partial / "config.json") | {"quantization_config": _configured(kind, group, ignored)}
    write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
    replace_directory(partial, out)
    return out


def _group_size(widths: Sequence[int]) -> int:
    found = next((size for size in (128, 64, 32, 16, 8) if all(width % size == 0 for width in widths)), None)
    if found is None:
        several = listed([str(width) for width in sorted(set(widths))])
        raise CheckpointError(f"int4: no group of 8 to 128 channels divides rows of {several}; try int8")
    return found


def _configured(kind: str, group: int | None, ignored: list[str]) -> dict[str, Any]:
    """As `config.json` describes it."""
    stored_as, bits, number = KINDS[kind]
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": number, "symmetric": True, "dynamic": False, **strategy}
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": stored_as,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {"group_0": group_0},
    }


def _codes(weight: Tensor, kind: str, group: int | None) -> dict[str, Tensor]:
    """The stored parts of a matrix, [rows, in_features]."""
    rows, width = weight.shape
    groups = weight.float().view(rows, -1, group or width)
    if kind == "fp8":
        scale = _scale(groups, torch.finfo(torch.float8_e4m3fn).max, weight.dtype)
        codes = (groups / scale.float()).to(torch.float8_e4m3fn)
        return {"weight": codes.view(rows, width), "weight_scale": scale.view(rows, -1)}
    _, bits, _ = KINDS[kind]
    top = 2 ** (bits - 1) - 1
    scale, least = torch.zeros(0), torch.full(groups.shape[:2], torch.inf)
    for share in _SHARES[bits]:
        tried = _scale(groups * share, top, weight.dtype)
        error = (_rounded(groups, tried, top) * tried.float() - groups).square().sum(-1)
        scale = tried if not scale.numel() else torch.where((error < least)[:, :, None], tried, scale)
        least = torch.minimum(error, least)
    packed = _packed(_rounded(groups, scale, top).view(rows, width).to(torch.int8), bits)
    return {"weight_packed": packed, "weight_scale": scale.view(rows, -1), "weight_shape": torch.tensor([rows, width])}


def _scale(groups: Tensor, top: float, dtype: torch.dtype) -> Tensor:
    """[rows, groups, 1] in the dtype in which it is stored; 1 where all weights are zero."""
    scale = (groups.abs().amax(-1, keepdim=True) / top).to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _rounded(groups: Tensor, scale: Tensor, top: int) -> Tensor:
    return (groups / scale.float()).round_().clamp_(-top - 1, top)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """The reverse of `_unpacked`."""
    count = 32 // bits
    filled = F.pad(codes.long() + 2 ** (bits - 1), (0, -codes.shape[1] % count))
    words = (filled.view(len(codes), -1, count) << (torch.arange(count) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

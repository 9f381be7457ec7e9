"""A checkpoint whose linear layers are stored in 8 bits or fewer, read as the weights that they stand for.

The format is that of compressed-tensors, which llm-compressor writes and vLLM and transformers read: beside each matrix
its scales, of the whole matrix, of a row, of a group of input channels or of a block; whole numbers in a byte each
(`int-quantized`), FP8 (`float-quantized`), or several to a 32-bit word (`pack-quantized`), with zero points if it is
asymmetric. A weight is (code - zero point) x scale. What a checkpoint says of activations is not used: they stay as
they are.
"""

import contextlib
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meswitch.codec.quantize import pack
from meswitch.durable import replacing_directory, write_text
from meswitch.errors import CheckpointError, ConfigError, listed
from meswitch.jsonfile import read_json
from meswitch.progress import Progress, silent
from meswitch.tensorfile import BuiltTensor, Shards, TensorInfo

if TYPE_CHECKING:
    from meswitch.architecture import LoadPlan

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
GROUP = 128  # channels with one scale, of codes of 4 bits that the kernels read
_GIVE = "give a checkpoint in 16 bit"


def quantisation(directory: Path) -> Mapping[str, Any] | None:
    """What a checkpoint's `config.json` says of how its weights are stored; None if they are plain."""
    file = directory / "config.json"
    return quantisation_of(read_json(file)) if file.is_file() else None


def quantisation_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The same of a configuration: of a model with images it may be that of its text model."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(found, Mapping) and found:
            return found
    return None


def unread_reason(config: Mapping[str, Any]) -> str | None:
    """Why `as_weights` does not read what a configuration describes; None if it does."""
    method, stored_as = config.get("quant_method"), config.get("format")
    if method != METHOD or stored_as not in FORMATS:
        return (
            f"its weights are quantised by {method or 'a method without a name'}"
            + (f" as {stored_as}" if stored_as else "")
            + f"; of quantised bases those of {METHOD} are read ({', '.join(FORMATS)})"
        )
    transform = config.get("transform_config") or {}
    if not isinstance(transform, Mapping) or transform.get("config_groups"):
        return "transform_config: its weights are rotated, and its activations as it computes; such bases are not read"
    sparsity = config.get("sparsity_config") or {}
    sparsity = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
    if sparsity not in (None, "dense"):
        return f"sparsity_config: its weights are stored without their zeros ({sparsity}); such bases are not read"
    return None


def as_weights(directory: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a quantised checkpoint, each matrix once and as weights, in the dtype of the configuration.

    Args:
        directory: of the checkpoint, for its configuration and for messages.
        tensors: as they are stored.

    Raises:
        CheckpointError: parts of a matrix are missing, or contradict each other or the configuration.
    """
    config = read_json(directory / "config.json")
    dtype = _dtype(config)
    layouts = _layouts(quantisation_of(config) or {})
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if f"{owner}.weight_scale" not in tensors:
            found[name] = info
        elif leaf in ("weight", "weight_packed"):
            parts = {part: tensors[f"{owner}.{part}"] for part in _PARTS if f"{owner}.{part}" in tensors}
            matrix = _matrix(f"{directory}: {owner}", parts, layouts)
            make = functools.partial(matrix.weights, dtype)
            nbytes = math.prod(matrix.shape) * dtype.itemsize
            name = f"{owner}.weight"
            found[name] = QuantisedTensor(name, dtype, matrix.shape, info.file, 0, nbytes, make, matrix)
        elif leaf.startswith("weight_") and leaf not in _PARTS:
            raise CheckpointError(f"{info.file}: {name}: a part of quantised weights that is not known; {_GIVE}")
        elif leaf not in _PARTS and not leaf.endswith(("_scale", "_zero_point")):
            found[name] = info  # such as its bias
    return dict(sorted(found.items()))


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    named = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)
    found = getattr(torch, str(named).removeprefix("torch."), None)
    return found if found in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the matrices of a group of layers are stored.

    Args:
        bits: of a code.
        is_float: whether codes are FP8; else they are whole numbers.
        is_symmetric: whether there are no zero points.
        high: rows that share a scale; 0: all.
        wide: input channels that share a scale; 0: all.
    """

    bits: int
    is_float: bool
    is_symmetric: bool
    high: int
    wide: int

    def blocks(self, rows: int, width: int) -> tuple[int, int]:
        """Rows and channels that share a scale in a matrix of this size."""
        return min(self.high or rows, rows), min(self.wide or width, width)

    def grid(self, rows: int, width: int) -> tuple[int, int]:
        """How many scales a matrix has, along its rows and along its channels."""
        high, wide = self.blocks(rows, width)
        return -(-rows // high), -(-width // wide)

    def held_bytes(self, rows: int, width: int) -> int:
        """What a matrix takes whose codes are computed with as they are; 0 if they are restored first.

        They are where each row has one scale: a byte a code, 4 a scale. And codes of 4 bits where each `GROUP` channels
        have one.
        """
        high, groups = self.blocks(rows, width)[0], self.grid(rows, width)[1]
        if not self.is_symmetric or not 1 <= self.bits <= 8:
            return 0
        if groups == 1:
            return rows * width + 4 * rows
        is_paired = self.bits == 4 and not self.is_float and high == 1 and groups * GROUP == width
        return rows * width // 2 + 4 * rows * groups if is_paired else 0

    def fits(self, parts: Mapping[str, TensorInfo], rows: int, width: int) -> bool:
        """Whether the parts of a matrix have the shapes and dtypes of this layout."""
        grid, scale = self.grid(rows, width), parts["weight_scale"].shape
        if scale != grid and not (len(scale) < 2 and (math.prod(scale), 1) == grid):
            return False
        if not self.is_symmetric and "weight_zero_point" not in parts:
            return False
        if "weight" in parts:
            return self.bits <= 8 and parts["weight"].dtype == (torch.float8_e4m3fn if self.is_float else torch.int8)
        packed = parts["weight_packed"]
        if self.is_float or not 1 <= self.bits <= 8 or packed.dtype != torch.int32:
            return False
        return packed.shape == (rows, -(-width // (32 // self.bits)))


def _layouts(config: Mapping[str, Any]) -> list[_Layout]:
    """How weights are stored, of each group of layers. One that is not understood is left out: then nothing fits it."""
    groups, found = config.get("config_groups"), []
    for scheme in groups.values() if isinstance(groups, Mapping) else ():
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # values of other kinds
            found.append(_layout(scheme.get("weights")))
    return found


def _layout(weights: Mapping[str, Any]) -> _Layout:
    """Of one group.

    Raises:
        ValueError: scales of another kind.
    """
    size: Any = weights.get("group_size")
    block: Any = weights.get("block_structure")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "group" and size > 0:
        high, wide = 1, int(size)
    elif strategy == "block":
        high, wide = (int(part) for part in (block.split("x") if isinstance(block, str) else block))
    elif strategy in ("tensor", "channel"):
        high, wide = int(strategy == "channel"), 0
    else:
        raise ValueError(strategy)
    is_float = weights.get("type", "int").lower() == "float"
    return _Layout(int(weights.get("num_bits", 8)), is_float, weights.get("symmetric", True), high, wide)


def _matrix(where: str, parts: Mapping[str, TensorInfo], layouts: Sequence[_Layout]) -> "_Matrix":
    """A matrix by its stored parts.

    Args:
        where: for messages.
        parts: by what they are called in the format.
        layouts: those that the configuration names.

    Raises:
        CheckpointError: its size is not known, or not exactly one layout fits it.
    """
    if "weight" in parts and "weight_packed" in parts:
        raise CheckpointError(f"{where}: stored twice, as weight and as weight_packed; save it anew")
    if "weight" in parts:
        shape = parts["weight"].shape
    elif "weight_shape" in parts:
        shape = tuple(parts["weight_shape"].read().tolist())
    else:
        raise CheckpointError(f"{where}: weight_shape: missing, so that its size is not known; save it anew")
    if len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(f"{where}: its weight is {list(shape)}; quantised matrices only are read")
    rows, width = shape
    fitting = [layout for layout in layouts if layout.fits(parts, rows, width)]
    alike = {(layout.bits if "weight_packed" in parts else 8, layout.blocks(rows, width)) for layout in fitting}
    if len(alike) != 1:
        stored = ", ".join(
            f"{part} {str(parts[part].dtype).removeprefix('torch.')} {list(parts[part].shape)}"
            for part in ("weight", "weight_packed", "weight_scale", "weight_zero_point")
            if part in parts
        )
        fault = "several groups of config_groups fit it" if alike else "no group of config_groups fits it"
        raise CheckpointError(f"{where}: {rows} x {width}, stored as {stored}: {fault} (quantization_config); {_GIVE}")
    return _Matrix(where, parts, rows, width, fitting[0])


@dataclass(frozen=True, slots=True)
class _Matrix:
    """The stored parts of one matrix, and how they are laid out.

    Args:
        where: for messages.
        parts: by what they are called in the format.
        rows: of the matrix.
        width: its input channels.
        layout: the one that fits.
    """

    where: str
    parts: Mapping[str, TensorInfo]
    rows: int
    width: int
    layout: _Layout

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, in_features]."""
        return self.rows, self.width

    def weights(self, dtype: torch.dtype) -> Tensor:
        """[rows, in_features]."""
        groups, zero = self._groups(), self._zero_points()
        codes = self._codes().float()
        if zero is not None:
            codes.sub_(self._spread(zero, groups))
        return codes.mul_(self._spread(self.parts["weight_scale"].read().float(), groups)).to(dtype)

    def _codes(self) -> Tensor:
        """[rows, in_features] int8 or float8_e4m3fn."""
        if "weight" in self.parts:
            return self.parts["weight"].read()
        return _unpacked(self.parts["weight_packed"].read(), self.layout.bits, self.width)

    def _groups(self) -> Tensor:
        """[in_features], which scale of its row a channel has. Groups need not lie in the order of the channels."""
        count = self.layout.grid(*self.shape)[1]
        stored = self.parts["weight_g_idx"].read().long() if "weight_g_idx" in self.parts else torch.tensor([-1])
        if (stored == -1).any():  # as the format says that they do lie in order
            return torch.arange(self.width) // self.layout.blocks(*self.shape)[1]
        if stored.shape != (self.width,) or not 0 <= int(stored.min()) <= int(stored.max()) < count:
            raise CheckpointError(
                f"{self.where}: weight_g_idx does not give each of {self.width} channels one of {count} groups; {_GIVE}"
            )
        return stored

    def _zero_points(self) -> Tensor | None:
        if "weight_zero_point" not in self.parts:
            return None
        high, wide = self.layout.grid(*self.shape)
        stored = self.parts["weight_zero_point"].read()
        if "weight_packed" in self.parts and stored.dtype == torch.int32:  # packed along the rows
            if stored.shape == (-(-high // (32 // self.layout.bits)), wide):
                return _unpacked(stored.T.contiguous(), self.layout.bits, high).T.float()
        elif stored.numel() == high * wide:
            return stored.float()
        raise CheckpointError(
            f"{self.where}: weight_zero_point is {list(stored.shape)} beside scales of {high} x {wide}; {_GIVE}"
        )

    def _spread(self, values: Tensor, groups: Tensor) -> Tensor:
        """Scales or zero points as a tensor that a [rows, in_features] matrix is multiplied with."""
        values = values.reshape(self.layout.grid(*self.shape))
        high, _ = self.layout.blocks(*self.shape)
        values = values.repeat_interleave(high, 0)[: self.rows] if len(values) > 1 and high > 1 else values
        return values if values.shape[1] == 1 else values[:, groups]

    @property
    def held_bytes(self) -> int:
        """As `QuantisedTensor.held_bytes`."""
        plain = not {"weight_zero_point", "weight_g_idx"} & self.parts.keys()
        return self.layout.held_bytes(*self.shape) if plain else 0

    def codes(self) -> tuple[Tensor, Tensor]:
        """As `QuantisedTensor.codes`."""
        high, _ = self.layout.blocks(*self.shape)
        scale = self.parts["weight_scale"].read().float().reshape(self.layout.grid(*self.shape))
        return self._codes().contiguous(), scale.repeat_interleave(high, 0)[: self.rows].contiguous()


@dataclass(frozen=True, slots=True)
class QuantisedTensor(BuiltTensor):
    """A matrix of a quantised checkpoint, which is read as weights.

    Args:
        matrix: its stored parts.
    """

    matrix: _Matrix

    @property
    def held_bytes(self) -> int:
        """What it takes as codes that are computed with as they are; 0 if they are not, see `_Layout.held_bytes`."""
        return self.matrix.held_bytes

    def codes(self) -> tuple[Tensor, Tensor]:
        """[rows, in_features] int8 or float8_e4m3fn, and [rows, 1] or [rows, groups] float32. It has held bytes."""
        return self.matrix.codes()


def _unpacked(packed: Tensor, bits: int, width: int) -> Tensor:
    """int32 words of `32 // bits` codes, lowest first -> [rows, width] int8, codes less the middle of their range."""
    if bits in (8, 4):  # one or two a byte: no detour over numbers of 64 bits
        found = packed.contiguous().view(-1).view(torch.uint8)
        if bits == 4:
            found = torch.stack([found & 15, found >> 4], 1)
        return found.view(len(packed), -1)[:, :width].contiguous().view(torch.int8) - 2 ** (bits - 1)
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
    model = architecture_of(source.config).model
    chosen = linear_layers(model, source.load_plan)
    if not chosen:
        raise CheckpointError(f"{source.directory}: has no linear layers that can be quantised")
    group = _group_size([source.tensors[name].shape[1] for name in chosen]) if kind == "int4" else None
    with replacing_directory(out) as partial:
        shards = Shards(partial)
        for done, (name, info) in enumerate(source.tensors.items()):
            progress("quantising", done, len(source.tensors), name)
            if name not in chosen:
                shards.add(name, info.read())
                continue
            for part, value in _codes(info.read(), kind, group).items():
                shards.add(name.removesuffix("weight") + part, value)
        shards.finish()
        for file in source.companions():
            shutil.copyfile(file, partial / file.name)
        layers = [path for path, module in model.named_modules() if type(module) is nn.Linear]
        ignored = sorted({*layers} - {*chosen.values()})
        config = read_json(partial / "config.json") | {"quantization_config": _configured(kind, group, ignored)}
        write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
    return out


def linear_layers(model: Any, plan: "LoadPlan") -> dict[str, str]:
    """The linear layers whose weights are stored one by one, without the head: stored name -> the module's."""
    layers = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    head, found = model.get_output_embeddings(), dict[str, str]()
    for rule in plan.conversions:
        owner = rule.targets[0].removesuffix(".weight")
        if rule.renames and owner in layers and layers[owner] is not head and rule.sources[0].endswith(".weight"):
            found[rule.sources[0]] = owner
    return found


def held_bytes(config: Mapping[str, Any], module: str, shape: tuple[int, ...]) -> int:
    """The bytes of a linear layer whose codes are computed with as they are, as far as a configuration says it; else 0.

    Args:
        config: as `quantisation` gives it.
        module: the layer's name.
        shape: [rows, in_features] of its weight.
    """

    def named(patterns: Any) -> bool:
        names = [name for name in patterns if isinstance(name, str)] if isinstance(patterns, list) else []
        return any(re.match(name[3:], module) if name.startswith("re:") else name == module for name in names)

    groups = config.get("config_groups")
    if unread_reason(config) is not None or named(config.get("ignore")) or not isinstance(groups, Mapping):
        return 0
    mine = [each for each in groups.values() if isinstance(each, Mapping) and _is_target(each, named)]
    layouts = _layouts({"config_groups": dict(enumerate(mine))})
    return layouts[0].held_bytes(*shape) if len(mine) == len(layouts) == 1 else 0


def _is_target(group: Mapping[str, Any], named: Callable[[Any], bool]) -> bool:
    targets = group.get("targets")
    return isinstance(targets, list) and ("Linear" in targets or named(targets))


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
        most = torch.finfo(torch.float8_e4m3fn).max  # beyond it older torch gives NaN: a scale may be rounded down
        scale = _scale(groups, most, weight.dtype)
        codes = (groups / scale.float()).clamp_(-most, most).to(torch.float8_e4m3fn)
        return {"weight": codes.view(rows, width), "weight_scale": scale.view(rows, -1)}
    _, bits, _ = KINDS[kind]
    top = 2 ** (bits - 1) - 1
    scale, least = torch.zeros(0), torch.full(groups.shape[:2], torch.inf)
    for share in _SHARES[bits]:
        tried = _scale(groups * share, top, weight.dtype)
        error = (_rounded(groups, tried, top) * tried.float() - groups).square().sum(-1)
        scale = tried if not scale.numel() else torch.where((error < least)[:, :, None], tried, scale)
        least = torch.minimum(error, least)
    codes = (_rounded(groups, scale, top) + 2 ** (bits - 1)).to(torch.uint8)
    packed = pack(codes.view(rows, width), bits)
    return {"weight_packed": packed, "weight_scale": scale.view(rows, -1), "weight_shape": torch.tensor([rows, width])}


def _scale(groups: Tensor, top: float, dtype: torch.dtype) -> Tensor:
    """[rows, groups, 1] in the dtype in which it is stored; 1 where all weights are zero."""
    scale = (groups.abs().amax(-1, keepdim=True) / top).to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _rounded(groups: Tensor, scale: Tensor, top: int) -> Tensor:
    return (groups / scale.float()).round_().clamp_(-top - 1, top)

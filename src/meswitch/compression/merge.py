"""Base + delta -> a plain checkpoint, on disk or in memory."""

import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch.adapter import open_expert
from meswitch.architecture import as_matrix, from_matrix
from meswitch.artifact import Artifact
from meswitch.checkpoint import Checkpoint
from meswitch.codec import EXACT, ExactDelta
from meswitch.configuration import read_config
from meswitch.durable import replacing_directory
from meswitch.errors import ArtifactError, ConfigError
from meswitch.loaded import LazyModel
from meswitch.tensorfile import BuiltTensor, Shards, TensorInfo
from meswitch.units import Progress, silent


def merged_tensors(base: Checkpoint, artifact: Artifact, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The expert's tensors as the artifact restores them, one at a time.

    Args:
        dtype: of the result; None as in `restored_tensor` (deltas are added in float32 either way).
    """
    artifact.check_base(base)
    return ((name, restored_tensor(base, artifact, name, dtype)) for name in artifact.manifest.tensors)


def restored_tensor(base: Checkpoint, artifact: Artifact, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor of the expert.

    Args:
        dtype: of the result; None is that of the base's tensor, or the expert's own where the base has none, or where
            the artifact is exact.
    """
    entry, value, original = artifact.manifest.tensors[name], artifact.read(name), base.info(name)
    if isinstance(value, Tensor):
        tensor = value
    elif value is None:
        tensor = base.read(name)
    elif isinstance(value, ExactDelta):
        tensor = value.restore(base.read(name), f"{artifact.directory}: {name}")
    else:
        theirs = base.read(name)
        matrix = as_matrix(theirs, entry.role)[: value.rows].float() + value.dequantize()
        if value.extra is not None:
            matrix = torch.cat([matrix, value.extra.float()])
        tensor = from_matrix(matrix.to(dtype or theirs.dtype), entry.shape, entry.role).contiguous()
    if tuple(tensor.shape) != entry.shape:
        raise ArtifactError(f"{artifact.directory}: {name}: restored as {list(tensor.shape)}, not {entry.shape}")
    exact = artifact.manifest.method.name == EXACT
    wanted = dtype or (tensor.dtype if exact or original is None else original.dtype)
    return tensor.to(wanted) if tensor.is_floating_point() else tensor


def as_checkpoint(base: Checkpoint, artifact: Artifact) -> Checkpoint:
    """The expert as a checkpoint, whose tensors are restored in float32 each time that they are read."""
    tensors: dict[str, TensorInfo] = {}
    for name, entry in artifact.manifest.tensors.items():
        nbytes = math.prod(entry.shape) * torch.float32.itemsize
        make = functools.partial(restored_tensor, base, artifact, name, torch.float32)
        tensors[name] = BuiltTensor(name, torch.float32, entry.shape, artifact.directory, 0, nbytes, make)
    return Checkpoint(artifact.manifest.expert.name, artifact.directory, tensors)


def merge(
    base: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    progress: Progress = silent,
) -> Path:
    """Write base + delta as a Hugging Face checkpoint, whole as the expert's was.

    Args:
        delta: an artifact, or a PEFT adapter.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the base's, and of an exact artifact the fine-tune's own.

    Raises:
        MeswitchError: see `meswitch.errors`; `out` appears only when it is complete.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out}: already exists; choose another --out")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype: {dtype!r} is none of float32, bfloat16, float16")
    checkpoint = Checkpoint.open(base)
    artifact = open_expert(delta, checkpoint)
    artifact.check_base(checkpoint)
    with replacing_directory(out) as partial:
        wanted = getattr(torch, dtype) if dtype else None
        shards = Shards(partial)
        done, total = 0, sum(math.prod(entry.shape) for entry in artifact.manifest.tensors.values())
        for name in artifact.manifest.tensors:
            tensor = restored_tensor(checkpoint, artifact, name, wanted)
            done += tensor.numel()
            progress("merging", done, total, name)
            shards.add(name, tensor)
        shards.finish()
        for name in artifact.manifest.companions:
            shutil.copyfile(artifact.directory / name, partial / name)
        if wanted is not None:
            config = json.loads((partial / "config.json").read_text())
            config.pop("torch_dtype", None)
            (partial / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))
    return out


def load_merged(base: str | Path, delta: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Base + delta as a model in memory, in evaluation mode: of a vision-language checkpoint the whole model.

    Returns:
        a `transformers.PreTrainedModel`.

    Raises:
        MeswitchError: another base, a damaged artifact, or one whose tensors are not those of its model.
    """
    checkpoint = Checkpoint.open(base)
    artifact = open_expert(delta, checkpoint)
    artifact.check_base(checkpoint)
    return LazyModel(
        read_config(artifact.directory),
        artifact.manifest.tensors,
        lambda name: restored_tensor(checkpoint, artifact, name, dtype),
        artifact.directory,
        torch.device("cpu"),
        dtype,
    ).load()

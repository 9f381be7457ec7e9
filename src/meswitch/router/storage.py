"""A router on disk: `router.json`, checked strictly, and `router.safetensors`.

Unknown, missing and mistyped fields are errors that name the file and the field; so are tensors whose shape, dtype or
checksum differ from what `router.json` says. Nothing is unpickled.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from meswitch.router.base import RouterError
from meswitch.strict import Decoder
from meswitch.tensorfile import fsync_path

FORMAT = "meswitch-router"
VERSION = 1
KIND = "embedding"
JSON_NAME = "router.json"
TENSORS_NAME = "router.safetensors"


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The model whose hidden states the router reads; `fingerprint` identifies it by content."""

    fingerprint: str
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Settings:
    """What the heads see and how they are fitted.

    layers: which hidden states are averaged (0: embeddings) to choose the expert. known_layers: to tell queries for
    some expert from others. max_tokens: of a query. buckets: of hashed words. smoothing: counts added by the word
    head. words: the word head's weight beside the states'. l2: on the state head's weights. folds: of the held-out
    calibration. encoder: whose states, `base` or a directory or hub id. bits: of its linear layers, 32 or 8. style:
    whether how a query is written counts for telling others. lower: whether that is also learnt from rows in lower
    case, for encoders that see the case. target_precision, target_coverage: what the threshold
    was chosen for; neither: to tell experts' queries from others.
    """

    layers: tuple[int, ...]
    known_layers: tuple[int, ...]
    max_tokens: int = 64
    buckets: int = 1 << 15
    smoothing: float = 0.7
    words: float = 1.0
    l2: float = 2e-5
    encoder: str = "base"
    bits: int = 32
    style: bool = False
    lower: bool = True
    target_precision: float | None = None
    target_coverage: float | None = None
    folds: int = 5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Calibration:
    """Fitted on held-out predictions, which also gave the figures (auroc is 0 without rows of `other`)."""

    temperature: float
    threshold: float
    accuracy: float
    ece: float
    auroc: float | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """What it was trained on (SHA-256 of the data file, rows of every domain), with what, and when (UTC)."""

    data_sha256: str
    rows: dict[str, int]
    meswitch: str
    torch: str
    transformers: str
    created: str


@dataclass(frozen=True, slots=True)
class RouterFile:
    """`router.json` without its head (format, version) and the checksum of the tensors.

    other: whether the heads have a last column for queries that no expert is for.
    """

    kind: str
    experts: tuple[str, ...]
    other: bool
    base: BaseInfo
    settings: Settings
    calibration: Calibration
    provenance: Provenance
    tensors_sha256: str = ""


def write_router(path: Path, file: RouterFile, tensors: dict[str, Tensor]) -> None:
    """Write to `<path>.partial`, flush to the disk, rename: `path` is never half a router."""
    path = path.resolve()
    if path.exists() and not (path / JSON_NAME).is_file():
        raise RouterError(f"{path}: exists and is not a router; choose another place")
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    file = dataclasses.replace(file, tensors_sha256=hashlib.sha256(raw).hexdigest())
    head = {"format": FORMAT, "version": VERSION}
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old.partial")
    try:
        for left_over in (partial, old):
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / TENSORS_NAME).write_bytes(raw)
        (partial / JSON_NAME).write_text(json.dumps(head | dataclasses.asdict(file), indent=2) + "\n")
        for part in (partial / TENSORS_NAME, partial / JSON_NAME, partial):
            fsync_path(part)
        if path.exists():  # a directory cannot be renamed onto one that is not empty
            os.replace(path, old)
        os.replace(partial, path)
        fsync_path(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RouterError(f"{path}: cannot be written: {error}") from error


def read_file(path: Path) -> RouterFile:
    """`router.json` of a router directory.

    Raises:
        RouterError: not a router, a newer version, or a field that is missing, unknown or of another type.
    """
    name = path / JSON_NAME
    try:
        data = json.loads(name.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RouterError(
            f"{path}: no router here; make one with `meswitch router train --family F --data rows.jsonl`"
        ) from None
    except (OSError, ValueError) as error:
        raise RouterError(f"{name}: not valid JSON ({error}); train the router again") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise RouterError(f"{name}: format: not a meswitch router (expected {FORMAT!r})")
    version = data.pop("version", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise RouterError(f"{name}: version: {version!r} is not a version number; train the router again")
    if version > VERSION:
        raise RouterError(f"{name}: version: {version} is newer than this meswitch reads ({VERSION}); upgrade meswitch")
    if data.get("kind") != KIND:
        raise RouterError(f"{name}: kind: {data.get('kind')!r} is not known to this meswitch (it has {KIND!r})")
    decoder = Decoder(name, RouterError, "train the router again", complete=True)
    file: RouterFile = decoder.decode(RouterFile, data)
    if not file.experts:
        raise RouterError(f"{name}: experts: empty; train the router again")
    return file


def read_tensors(path: Path, file: RouterFile, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors, float32, of exactly the `expected` names and shapes.

    Raises:
        RouterError: missing or damaged.
    """
    name = path / TENSORS_NAME
    try:
        raw = name.read_bytes()
    except OSError as error:
        raise RouterError(f"{name}: cannot be read ({error}); train the router again") from None
    if hashlib.sha256(raw).hexdigest() != file.tensors_sha256:
        raise RouterError(f"{name}: tensors_sha256: does not match {JSON_NAME}; copy or train the router again")
    try:
        tensors: dict[str, Tensor] = load(raw)
    except SafetensorError as error:
        raise RouterError(f"{name}: not a safetensors file ({error}); train the router again") from None
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key in expected.keys() | found.keys():
        if found.get(key) != expected.get(key):
            raise RouterError(f"{name}: {key}: expected shape {expected.get(key)}, found {found.get(key)}")
        if tensors[key].dtype != torch.float32:
            raise RouterError(f"{name}: {key}: expected float32, found {tensors[key].dtype}")
    return tensors

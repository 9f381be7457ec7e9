"""A router on disk: `router.json`, checked strictly, and `router.safetensors`.

Unknown, missing and mistyped fields are errors that name the file and the field; so are tensors whose shape, dtype or
checksum differ from what `router.json` says. Nothing is unpickled.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from meswitch.artifact.fingerprint import sha256_file
from meswitch.durable import fsync_path, replace_directory
from meswitch.router.base import RouterError
from meswitch.router.records import Calibration, CascadeFile, LlmFile, Provenance, RouteOption, RulesFile
from meswitch.strict import Decoder

FORMAT = "meswitch-router"
VERSION = 2  # 2: an embedding router's `routes`, and `prior` and `own` of its settings
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
    case, for encoders that see the case. prior, own: where there is one, the weights of the prior's log-odds beside the
    heads' and of the heads' odds beside the prior's (measured on 15 sources: `benchmarks/routing_prior.py`).
    target_precision, target_coverage: what the threshold
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
    prior: float = 1.5
    own: float = 0.3
    target_precision: float | None = None
    target_coverage: float | None = None
    folds: int = 5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RouterFile:
    """`router.json` without its head (format, version) and the checksum of the tensors.

    other: whether the router knows queries that no expert is for. added: how many of the experts, the last ones, were
    added by examples. routes: what is said of the experts, if that is where the router starts from.
    """

    kind: str
    experts: tuple[str, ...]
    other: bool
    added: int
    base: BaseInfo
    settings: Settings
    calibration: Calibration
    provenance: Provenance
    routes: tuple[RouteOption, ...]
    tensors_sha256: str = ""


AnyFile = RouterFile | LlmFile | CascadeFile | RulesFile
_KINDS: dict[str, type[AnyFile]] = {KIND: RouterFile, "llm": LlmFile, "cascade": CascadeFile, "rules": RulesFile}


class Keepable(Protocol):
    """A router that can write itself."""

    def save(self, path: str | Path) -> None: ...


def write_router(
    path: Path, file: AnyFile, tensors: Mapping[str, Tensor], members: Mapping[str, Keepable] | None = None
) -> None:
    """Write to `<path>.partial`, flush to the disk, rename: `path` is never half a router.

    members: routers that this one is made of; each becomes a directory in it.

    Raises:
        RouterError: `path` exists and is not a router, or cannot be written.
    """
    path = path.resolve()
    if path.exists() and not (path / JSON_NAME).is_file():
        raise RouterError(f"{path}: exists and is not a router; choose another place")
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    file = dataclasses.replace(file, tensors_sha256=hashlib.sha256(raw).hexdigest())
    head = {"format": FORMAT, "version": VERSION}
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if isinstance(file, CascadeFile | RulesFile):
            for name, member in (members or {}).items():
                member.save(partial / name)
            checksums = {name: sha256_file(partial / name / JSON_NAME) for name in members or {}}
            file = dataclasses.replace(file, members=checksums)
        (partial / TENSORS_NAME).write_bytes(raw)
        (partial / JSON_NAME).write_text(json.dumps(head | dataclasses.asdict(file), indent=2) + "\n")
        for part in (partial / TENSORS_NAME, partial / JSON_NAME):
            fsync_path(part)
        replace_directory(partial, path)
    except OSError as error:
        raise RouterError(f"{path}: cannot be written: {error}") from error


def read_file(path: Path) -> AnyFile:
    """`router.json` of a router directory, of whichever kind it is.

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
    if version < 2 and data.get("kind") == KIND and isinstance(data.get("settings"), dict):
        data = {"routes": []} | data | {"settings": {"prior": 0.0, "own": 1.0} | data["settings"]}
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise RouterError(f"{name}: kind: {kind!r} is not known to this meswitch (it has {known})")
    decoder = Decoder(name, RouterError, "train the router again", complete=True)
    file: AnyFile = decoder.decode(_KINDS[kind], data)
    if not file.experts:
        raise RouterError(f"{name}: experts: empty; train the router again")
    return file


def read_tensors(path: Path, file: RouterFile, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors, float32, of exactly the `expected` names and shapes.

    Raises:
        RouterError: missing or damaged.
    """
    name = path / TENSORS_NAME
    tensors = read_all_tensors(path, file)
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key in expected.keys() | found.keys():
        if found.get(key) != expected.get(key):
            raise RouterError(f"{name}: {key}: expected shape {expected.get(key)}, found {found.get(key)}")
        if tensors[key].dtype != torch.float32:
            raise RouterError(f"{name}: {key}: expected float32, found {tensors[key].dtype}")
    return tensors


def read_all_tensors(path: Path, file: AnyFile) -> dict[str, Tensor]:
    """The tensors as they are, once their checksum is right.

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
    return tensors


def check_members(path: Path, file: CascadeFile | RulesFile, names: Collection[str]) -> None:
    """Are the routers that this one is made of there, and the ones it was saved with?

    names: which there must be; others are refused.

    Raises:
        RouterError: names the member.
    """
    if file.members.keys() != set(names):
        raise RouterError(f"{path / JSON_NAME}: members: expected {', '.join(names)}, found {', '.join(file.members)}")
    for name, checksum in file.members.items():
        inner = path / name / JSON_NAME
        if not inner.is_file():
            raise RouterError(f"{inner}: no such file; the router is incomplete, copy or train it again")
        if sha256_file(inner) != checksum:
            raise RouterError(f"{path / JSON_NAME}: members.{name}: does not match {inner}; train the router again")

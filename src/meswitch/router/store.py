"""Routers on disk, of whichever kind: `router.json`, checked strictly, and `router.safetensors`.

Unknown, missing and mistyped fields are errors that name the file and the field; so are tensors whose shape, dtype or
checksum differ from what `router.json` says. Nothing is unpickled.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from meswitch import __version__
from meswitch.checkpoint import sha256_file
from meswitch.durable import fsync_path, recover_directory, replacing_directory
from meswitch.jsonfile import Decoder
from meswitch.router.base import Router, RouterError

FORMAT = "meswitch-router"
VERSION = 4  # of an embedding router: 2 has `routes`, `settings.prior` and `own`; 3 `settings.tasks`; 4 `base.update`
JSON_NAME = "router.json"
TENSORS_NAME = "router.safetensors"
ENTRY_POINTS = "meswitch.routers"


@dataclass(frozen=True, slots=True)
class ScoreCalibration:
    """Fitted on held-out predictions, which also gave the figures (auroc is None without rows of `other`)."""

    temperature: float
    threshold: float
    accuracy: float
    ece: float
    auroc: float | None = None


@dataclass(frozen=True, slots=True)
class RouterProvenance:
    """What it was trained on (SHA-256 of the data file, rows of every domain), with what, and when (UTC)."""

    data_sha256: str
    rows: dict[str, int]
    meswitch: str
    torch: str
    transformers: str
    created: str

    @classmethod
    def of(cls, domains: Iterable[str], data_sha256: str) -> "RouterProvenance":
        """That of a training which ends now.

        Args:
            domains: of all its rows.
            data_sha256: of the file of rows.
        """
        import transformers

        return cls(
            data_sha256=data_sha256,
            rows=dict(sorted(Counter(domains).items())),
            meswitch=__version__,
            torch=torch.__version__,
            transformers=transformers.__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )


class File(Protocol):
    """What `router.json` holds of one kind, without its head (format, version): a frozen dataclass.

    A kind made of other routers has a field `members`, SHA-256 of each one's `router.json`.
    """

    kind: str
    experts: tuple[str, ...]
    tensors_sha256: str


@dataclass(frozen=True)
class OpenOptions:
    """How a router on disk is opened; the fields are the arguments of `load_router`."""

    base: str | Path
    fallback: str = "base"
    threshold: float | None = None
    model: Any = None
    tokenizer: Any = None
    device: str = "cpu"
    llm: str | Path | None = None


class StoredKind(Protocol):
    """A class of routers that can be written and read: one file of this package, imported by its `__init__`.

    Another package's is found by an entry point of the group `meswitch.routers`: the kind, and the module to import.

    Args:
        file: its part of `router.json`.
        unknown: what to do about experts that it does not know, beside training again.
    """

    file: ClassVar[type[Any]]
    unknown: ClassVar[str]

    @classmethod
    def open(cls, directory: Path, file: Any, given: OpenOptions) -> Router: ...

    @classmethod
    def upgraded(cls, data: dict[str, Any], version: int) -> dict[str, Any]:
        """`router.json` of an older version as this one would have written it."""


_KINDS: dict[str, Any] = {}
_R = TypeVar("_R", bound=Router)


def register_router(name: str) -> Callable[[type[_R]], type[_R]]:
    """A class decorator: routers whose `router.json` says this kind are opened by the class. See `StoredKind`."""

    def add(router: type[_R]) -> type[_R]:
        _KINDS[name] = router
        return router

    return add


class Keepable(Protocol):
    """A router that can write itself."""

    def save(self, path: str | Path) -> None: ...


def write_router(
    path: Path, file: Any, tensors: Mapping[str, Tensor], members: Mapping[str, Keepable] | None = None
) -> None:
    """Write to `<path>.partial`, flush to the disk, rename: `path` is never half a router.

    Args:
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
    try:
        with replacing_directory(path) as partial:
            if members is not None:
                for name, member in members.items():
                    member.save(partial / name)
                checksums = {name: sha256_file(partial / name / JSON_NAME) for name in members}
                file = dataclasses.replace(file, members=checksums)
            (partial / TENSORS_NAME).write_bytes(raw)
            (partial / JSON_NAME).write_text(json.dumps(head | dataclasses.asdict(file), indent=2) + "\n")
            for part in (partial / TENSORS_NAME, partial / JSON_NAME):
                fsync_path(part)
    except OSError as error:
        raise RouterError(f"{path}: cannot be written: {error}") from error


def read_file(path: Path) -> Any:
    """`router.json` of a router directory, of whichever kind it is.

    Raises:
        RouterError: not a router, a newer version, or a field that is missing, unknown or of another type.
    """
    recover_directory(path)
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
    kind = data.get("kind")
    if isinstance(kind, str) and kind not in _KINDS:
        for point in entry_points(group=ENTRY_POINTS, name=kind):
            point.load()
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise RouterError(f"{name}: kind: {kind!r} is not known to this meswitch (it has {known})")
    router = _KINDS[kind]
    decoder = Decoder(name, RouterError, "train the router again", complete=True)
    file: Any = decoder.decode(router.file, router.upgraded(data, version) if version < VERSION else data)
    if not file.experts:
        raise RouterError(f"{name}: experts: empty; train the router again")
    return file


def read_tensors(path: Path, file: Any, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
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


def read_all_tensors(path: Path, file: Any) -> dict[str, Tensor]:
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


def check_members(path: Path, file: Any, names: Collection[str]) -> None:
    """Are the routers that this one is made of there, and the ones it was saved with?

    Args:
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


def load_router(
    path: str | Path,
    base: str | Path,
    *,
    experts: Sequence[str] | None = None,
    fallback: str = "base",
    threshold: float | None = None,
    model: Any = None,
    tokenizer: Any = None,
    device: str = "cpu",
    llm: str | Path | None = None,
) -> Router:
    """Load a router directory for a base.

    Args:
        path: what `meswitch router train` wrote.
        base: the base's checkpoint directory or hub id.
        experts: the family's; the router's must be the same ones. None: do not compare.
        fallback: who answers when the router abstains.
        threshold: instead of the calibrated one.
        model: the base, if it is loaded already.
        tokenizer: the base's; give both or none.
        device: where to load models otherwise.
        llm: where an LLM router's model is now, if it is not where it was.

    Raises:
        RouterError: no router, damaged or newer, of other experts, or trained on another base or model.
        CheckpointError: no base.
    """
    directory = Path(path)
    file = read_file(directory)
    if experts is not None:
        check_experts(directory, file, experts)
    return open_kind(directory, file, OpenOptions(base, fallback, threshold, model, tokenizer, device, llm))


def open_kind(directory: Path, file: Any, given: OpenOptions) -> Router:
    """The router of a directory whose `router.json` was read."""
    router: Router = _KINDS[file.kind].open(directory, file, given)
    return router


def open_member(directory: Path, given: OpenOptions) -> Router:
    """A router inside another one; it decides by its own threshold, if at all.

    Raises:
        RouterError: see `load_router`; or one that is itself a member and made of routers.
    """
    file = read_file(directory)
    if hasattr(file, "members") and directory.parent.name in ("first", "second", "router"):
        raise RouterError(f"{directory}: kind: routers of routers of routers are not read")
    return open_kind(directory, file, replace(given, threshold=None))


def check_no_tensors(directory: Path, file: Any) -> None:
    """
    Raises:
        RouterError: a router of a kind that has no tensors of its own has some.
    """
    tensors = read_all_tensors(directory, file)
    if tensors:
        raise RouterError(f"{directory}: {min(tensors)}: a {file.kind} router has no tensors of its own")


def check_experts(directory: Path, file: Any, experts: Sequence[str]) -> None:
    """Does the router know these experts and no others?

    Raises:
        RouterError: names them, and what to do.
    """
    gone = [name for name in file.experts if name not in experts]
    new = [name for name in experts if name not in file.experts]
    if gone or new:
        parts = [f"knows {', '.join(gone)}, which the family has not"] if gone else []
        parts += [f"does not know {', '.join(new)}"] if new else []
        raise RouterError(
            f"{directory}: experts: the router {' and '.join(parts)}; train it again with `meswitch router train`"
            + ("" if gone else _KINDS[file.kind].unknown)
        )

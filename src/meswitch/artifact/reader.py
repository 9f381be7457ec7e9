"""Opening an artifact: nothing is handed out before its shape, dtype and checksum agree with the manifest.

Checksums take most of the time, and SHA-256 is computed without the GIL: `ReadAhead` reads by several threads.
`account` says where the bytes are; for that no tensor is read.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from meswitch.architecture import STACKS
from meswitch.artifact.manifest import MANIFEST_NAME, Entry, Manifest, Stored, stored_name
from meswitch.artifact.remote import local_artifact
from meswitch.checkpoint import Checkpoint, fingerprint, sha256_file
from meswitch.codec import (
    Change,
    Delta,
    ExactDelta,
    LowRankDelta,
    coded_by,
    packed_shape,
    restore_coded,
)
from meswitch.codec.delta import packed_from, with_all_rows
from meswitch.codec.exact import block_count
from meswitch.codec.quantize import group_count
from meswitch.durable import recover_directory
from meswitch.errors import ArtifactError, CheckpointError, IncompatibleError, MeswitchError
from meswitch.tensorfile import DTYPES, NAMES, TensorInfo, read_header, tensor_bytes
from meswitch.units import Progress, silent

_THREADS = 4
_AHEAD = 8  # tensors: what is read and not asked for yet stays small


@dataclass(frozen=True)
class Artifact:
    """A compressed expert on disk, its header checked, its tensors not yet read."""

    directory: Path
    manifest: Manifest
    infos: dict[str, TensorInfo]

    @classmethod
    def open(cls, directory: str | Path) -> "Artifact":
        """Open and check everything that costs no reading of tensors.

        Args:
            directory: or `hf://org/name`, an artifact of the hub, which is kept in the Hugging Face cache.

        Raises:
            ArtifactError: incomplete, damaged, foreign or newer.
        """
        directory = local_artifact(directory)
        recover_directory(directory)
        file = directory / MANIFEST_NAME
        if directory.name.endswith(".partial"):
            raise ArtifactError(f"{directory}: an unfinished compression; run the same `meswitch compress` again")
        if not file.is_file():
            hint = ""
            if directory.with_name(directory.name + ".partial").is_dir():
                hint = "; its compression was interrupted, run the same `meswitch compress` again"
            elif (directory / "config.json").is_file():
                hint = "; this is a full checkpoint, compress it first"
            raise ArtifactError(f"{file}: no such file, so this is not a meswitch artifact{hint}")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{file}: not valid UTF-8 ({error.reason}); the file is damaged") from None
        manifest = Manifest.from_json(text, file)
        artifact = cls(directory, manifest, {})
        artifact._check_headers()
        artifact._check_companions()
        return artifact

    def _check_headers(self) -> None:
        headers: dict[str, dict[str, TensorInfo]] = {}
        for name, entry in self.manifest.tensors.items():
            self._check_entry(name, entry)
            for suffix, part in entry.stored.items():
                stored = stored_name(name, suffix)
                path = self.directory / part.file
                if Path(part.file).name != part.file:
                    raise ArtifactError(f"{path}: tensors.{name}.file: must be a file name in the artifact")
                if part.file not in headers:
                    if not path.is_file():
                        raise ArtifactError(f"{path}: missing; copy the artifact again or compress again")
                    try:
                        headers[part.file] = read_header(path)
                    except MeswitchError as error:
                        raise ArtifactError(str(error)) from None
                info = headers[part.file].get(stored)
                if info is None:
                    raise ArtifactError(f"{path}: has no tensor {stored}, which the manifest lists")
                found = (NAMES[info.dtype], info.shape, info.nbytes)
                if found != (part.dtype, part.shape, part.bytes):
                    raise ArtifactError(
                        f"{path}: {stored} is {found[0]} {list(found[1])}, the manifest says {part.dtype} "
                        f"{list(part.shape)}; the files do not belong together"
                    )
                self.infos[stored] = info
        for part_file, header in headers.items():
            for stored in header:
                if stored not in self.infos:
                    raise ArtifactError(f"{self.directory / part_file}: {stored} is not in the manifest")

    def _check_entry(self, name: str, entry: Entry) -> None:
        """The parts of a tensor must have the shapes that its own shape, bits and group size imply."""
        file = self.directory / MANIFEST_NAME
        expected: dict[str, tuple[int, ...]]
        if entry.kind == "same":
            expected = {}
        elif entry.kind == "dense":
            expected = {"": entry.shape}
        elif entry.kind == "coded":
            expected = self._coded_shapes(name, entry)
        elif entry.kind == "lowrank":
            expected = self._lowrank_shapes(name, entry)
        elif entry.kind == "exact":
            expected = self._exact_shapes(name, entry)
        else:
            self._check_matrix(name, entry)
            columns, bits = entry.matrix[1], entry.bits or 0
            salient, live = entry.stored.get("salient_index"), entry.stored.get("row_index")
            rows = entry.base_rows if live is None else live.shape[0] if live.shape else -1
            expected = {} if live is None else {"row_index": (rows,)}
            expected |= {
                "weight_packed": packed_shape(rows, columns, bits, entry.block),
                "weight_scale": (rows, group_count(columns, entry.group_size)),
                "weight_shape": (2,),
            }
            if salient is not None:
                expected |= {"salient_index": salient.shape[:1], "salient_weight": (rows, *salient.shape[:1])}
        if entry.kind in ("packed", "coded", "lowrank") and "weight_extra" in entry.stored:
            expected["weight_extra"] = (entry.matrix[0] - entry.base_rows, entry.matrix[1])
        found = {suffix: part.shape for suffix, part in entry.stored.items()}
        if found != expected:
            raise ArtifactError(f"{file}: tensors.{name}.stored: shapes {found} do not fit the tensor ({expected})")

    def _coded_shapes(self, name: str, entry: Entry) -> dict[str, tuple[int, ...]]:
        """What the method stores for this tensor, its dtypes compared."""
        where = f"{self.directory / MANIFEST_NAME}: tensors.{name}"
        self._check_matrix(name, entry)
        try:
            shapes = coded_by(entry.method, entry.meta).shapes(entry.base_rows, entry.matrix[1], entry.meta or {})
        except ValueError as error:
            raise ArtifactError(f"{where}.{error}") from None
        for suffix, part in entry.stored.items():
            if suffix in shapes and part.dtype != NAMES[shapes[suffix][1]]:
                raise ArtifactError(f"{where}.stored.{suffix}.dtype: {part.dtype}, not {NAMES[shapes[suffix][1]]}")
        return {suffix: shape for suffix, (shape, _) in shapes.items()}

    def _lowrank_shapes(self, name: str, entry: Entry) -> dict[str, tuple[int, ...]]:
        where = f"{self.directory / MANIFEST_NAME}: tensors.{name}"
        self._check_matrix(name, entry)
        left, right = entry.stored.get("weight_left"), entry.stored.get("weight_right")
        live = entry.stored.get("row_index")
        if left is None or right is None or len(left.shape) != 2 or len(right.shape) != 2:
            raise ArtifactError(f"{where}.stored: a low-rank tensor has two parts of two dimensions")
        for suffix in {"weight_left", "weight_right"} & entry.stored.keys():
            if not DTYPES.get(entry.stored[suffix].dtype, torch.int32).is_floating_point:
                raise ArtifactError(f"{where}.stored.{suffix}.dtype: {entry.stored[suffix].dtype}, not a float")
        rank, rows = left.shape[1], entry.base_rows if live is None else live.shape[0] if live.shape else -1
        rows_right = rank * math.prod(entry.shape[:-2])
        shapes: dict[str, tuple[int, ...]] = {
            "weight_left": (rows, rank),
            "weight_right": (rows_right, entry.matrix[1]),
        }
        return shapes if live is None else shapes | {"row_index": (rows,)}

    def _exact_shapes(self, name: str, entry: Entry) -> dict[str, tuple[int, ...]]:
        where = f"{self.directory / MANIFEST_NAME}: tensors.{name}.stored"
        dtypes = {"weight_exact": "U8", "weight_blocks": "I64"}
        for suffix, part in entry.stored.items():
            if part.dtype != dtypes.get(suffix, part.dtype):
                raise ArtifactError(f"{where}.{suffix}.dtype: {part.dtype}, not {dtypes[suffix]}")
        stream = entry.stored.get("weight_exact")
        planes = DTYPES[entry.dtype or ""].itemsize
        return {
            "weight_exact": (0,) if stream is None else stream.shape[:1],
            "weight_blocks": (block_count(math.prod(entry.shape)), planes + 1),
        }

    def _check_matrix(self, name: str, entry: Entry) -> None:
        """A tensor that is compressed must have a matrix's dimensions, or those of a stack of matrices."""
        if len(entry.shape) != 2 and not (len(entry.shape) == 3 and entry.role in STACKS):
            what = "three dimensions" if entry.role in STACKS else "two dimensions"
            raise ArtifactError(
                f"{self.directory / MANIFEST_NAME}: tensors.{name}.shape: a {entry.kind} tensor of role "
                f"{entry.role!r} has {what}"
            )

    def _check_companions(self) -> None:
        for name in self.manifest.companions:
            if not (self.directory / name).is_file():
                raise ArtifactError(f"{self.directory / name}: missing; copy the artifact again or compress again")
        if "config.json" not in self.manifest.companions:
            raise ArtifactError(f"{self.directory / MANIFEST_NAME}: companions: config.json is not listed")

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(entry.bytes for entry in self.manifest.tensors.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of every file of the artifact, tokenizer and manifest included."""
        return sum(path.stat().st_size for path in self.directory.iterdir() if path.is_file())

    @property
    def bits_per_weight(self) -> float:
        """All tensor bytes (codes, scales, salient channels, embeddings, norms) x 8 / all parameters."""
        return self.nbytes * 8 / self.manifest.expert.parameters

    def read_stored(self, name: str, suffix: str = "") -> Tensor:
        """One stored tensor, its checksum compared.

        Raises:
            ArtifactError: the bytes are not those that were written.
        """
        part: Stored = self.manifest.tensors[name].stored[suffix]
        info = self.infos[stored_name(name, suffix)]
        tensor = info.read()  # not `bytearray`, which Python fills with zeros while no other thread runs
        if hashlib.sha256(tensor_bytes(tensor)).hexdigest() != part.sha256:
            raise ArtifactError(
                f"{info.file}: {info.name}: checksum differs from the manifest's: the file is damaged or was changed; "
                "copy the artifact again or compress again"
            )
        return tensor

    def read(self, name: str) -> Change | Tensor | None:
        """A tensor of the expert: its delta, its own values, or None where it equals the base's."""
        entry = self.manifest.tensors[name]
        if entry.kind == "same":
            return None
        if entry.kind == "dense":
            return self.read_stored(name)
        parts = self._checked_parts(name)
        if entry.kind == "coded":
            return restore_coded(entry.method, entry.meta, parts, entry.base_rows, entry.matrix[1])
        return delta_from_parts(entry, parts)

    def _checked_parts(self, name: str) -> dict[str, Tensor]:
        """All parts of one tensor, their values checked where a wrong one would read out of bounds."""
        entry = self.manifest.tensors[name]
        parts = {suffix: self.read_stored(name, suffix) for suffix in entry.stored}
        where = f"{self.directory / MANIFEST_NAME}: tensors.{name}"
        shape = parts.get("weight_shape")
        if shape is not None and tuple(shape.tolist()) != entry.matrix:
            raise ArtifactError(f"{where}.shape: {list(entry.shape)}, but the stored weight_shape is {shape.tolist()}")
        limits = {"salient_index": (entry.matrix[1], "input channels"), "row_index": (entry.base_rows, "rows")}
        for suffix, (limit, unit) in limits.items() if entry.kind in ("packed", "lowrank") else ():
            index = parts.get(suffix)
            if index is None or not index.numel():
                continue
            ascending = bool((index.diff() > 0).all())
            if not (ascending and int(index[0]) >= 0 and int(index[-1]) < limit):
                raise ArtifactError(f"{where}.{suffix}: not ascending within {limit} {unit}")
        return parts

    def verify(self, progress: Progress = silent) -> None:
        """Read everything once and compare every checksum.

        Raises:
            ArtifactError: naming the file and the tensor.
        """
        done = 0
        for name, entry in self.manifest.tensors.items():
            progress("reading the artifact", done, self.nbytes, name)
            self._checked_parts(name)
            done += entry.bytes
        for name, digest in self.manifest.companions.items():
            if sha256_file(self.directory / name) != digest:
                raise ArtifactError(
                    f"{self.directory / name}: differs from the manifest's checksum; copy the artifact again"
                )

    def check_base(
        self, base: Checkpoint, *, full: bool = False, known: str | None = None, progress: Progress = silent
    ) -> None:
        """Refuse another base.

        Args:
            full: compare the SHA-256 of every tensor, not only the sampled fingerprint.
            known: the base's fingerprint, where several artifacts are checked against one base.

        Raises:
            IncompatibleError: naming what differs.
        """
        wanted = self.manifest.base
        if full:
            done = 0
            for name, entry in self.manifest.tensors.items():
                info = base.info(name)
                if entry.base_sha256 is None:
                    continue
                progress("reading the base", done, base.nbytes, name)
                done += 0 if info is None else info.nbytes
                if not _is(info, entry):
                    raise IncompatibleError(
                        f"{base.directory}: {name} is not the tensor that {self.directory} was compressed against; "
                        f"give its base, which was called {wanted.name!r}, or compress again"
                    )
        found = known or fingerprint(base)
        if found != wanted.fingerprint and not self._loads_alike(base):
            fix = "use that base or compress again"
            if base.is_quantised:
                fix = (
                    "use that base, or compress again against this quantised one, so that the deltas repair its error; "
                    "if this one was made from that base, vLLM serves both together (`meswitch serve --engine vllm`)"
                )
            raise IncompatibleError(
                f"{base.directory}: its fingerprint {found[15:27]}… is not the {wanted.fingerprint[15:27]}… of "
                f"{wanted.name!r}, against which {self.directory} was compressed; {fix}"
            )

    def _loads_alike(self, base: Checkpoint) -> bool:
        """Whether a base that is stored in another way is the same once it is loaded.

        It may hold buffers that no model needs, other names, or matrices of experts in stacks. Of a stack the sampled
        fingerprint says nothing, so the sums of all tensors are compared.
        """
        if base.is_quantised:
            return False
        with contextlib.suppress(CheckpointError):
            if fingerprint(base.loaded) == self.manifest.base.fingerprint:
                return True
        sums = {name: entry for name, entry in self.manifest.tensors.items() if entry.base_sha256 is not None}
        return bool(sums) and all(_is(base.info(name), entry) for name, entry in sums.items())


def _is(info: TensorInfo | None, entry: Entry) -> bool:
    """Whether a tensor is the base's that an entry was compressed against."""
    return info is not None and info.sha256() == entry.base_sha256


def delta_from_parts(entry: Entry, parts: dict[str, Tensor]) -> Delta | ExactDelta:
    """A delta over the parts of a packed, low-rank or exact entry, wherever they lie."""
    if entry.kind == "exact":
        return ExactDelta(parts["weight_exact"], parts["weight_blocks"], entry.shape, DTYPES[entry.dtype or ""])
    parts = with_all_rows(parts, entry.base_rows)
    if entry.kind == "lowrank":
        if entry.scale is None:
            raise ArtifactError("a low-rank tensor needs its scale")
        return LowRankDelta(parts["weight_left"], parts["weight_right"], entry.scale, parts.get("weight_extra"))
    if entry.bits is None:
        raise ArtifactError("a packed tensor needs its bits")
    width = entry.matrix[1]
    return packed_from(parts, width, bits=entry.bits, group_size=entry.group_size, block=entry.block)


class ReadAhead:
    """An artifact whose tensors are read before they are asked for, in a `with` block.

    Args:
        names: the order in which they will be asked for. Others, and one a second time, are read when they are.
    """

    def __init__(self, artifact: Artifact, names: Iterable[str]) -> None:
        self._artifact = artifact
        self._names = iter(dict.fromkeys(names))
        self._pending: dict[str, Future[Any]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, "artifact")

    def read(self, name: str) -> Change | Tensor | None:
        """As `Artifact.read`, and raises what that raises."""
        future = self._pending.pop(name, None)
        self._fill()
        return self._artifact.read(name) if future is None else future.result()

    def _fill(self) -> None:
        while len(self._pending) < _AHEAD and (name := next(self._names, None)) is not None:
            self._pending[name] = self._threads.submit(self._artifact.read, name)

    def __enter__(self) -> "ReadAhead":
        self._fill()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)


# By the suffix of the stored name; baselines have more codes (`..._packed`) and scales (`..._scale`).
_CONTENT = {
    "weight_packed": "codes",
    "weight_scale": "scales",
    "weight_shape": "shapes",
    "salient_index": "salient channels",
    "salient_weight": "salient channels",
    "weight_extra": "added rows",
    "row_index": "row indices",
    "weight_left": "low-rank pairs",
    "weight_right": "low-rank pairs",
    "weight_exact": "exact changes",
    "weight_blocks": "tables of blocks",
    "mask_packed": "sparsity pattern",
    "index_packed": "sparsity pattern",
    "factor_left": "factors",
    "factor_right": "factors",
}


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """One layer type: its parameters, bytes and bits per weight."""

    layer: str
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.bytes * 8 / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, slots=True)
class Accounting:
    """`by_content` and `by_layer` each add up to the artifact's tensor bytes."""

    by_content: dict[str, int]
    by_layer: tuple[LayerBytes, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; every layer type with its bits per weight."""
        by_layer = [asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in self.by_layer]
        return {"by_content": self.by_content, "by_layer": by_layer}


def account(artifact: Artifact) -> Accounting:
    """Sum the artifact's tensor bytes both ways."""
    content: dict[str, int] = {}
    layers: dict[str, list[int]] = {}
    for name, entry in artifact.manifest.tensors.items():
        for suffix, part in entry.stored.items():
            kind = _content(suffix)
            content[kind] = content.get(kind, 0) + part.bytes
        parameters = 1
        for size in entry.shape:
            parameters *= size
        total = layers.setdefault(layer_type(name), [0, 0])
        total[0] += parameters
        total[1] += entry.bytes
    by_layer = tuple(LayerBytes(layer, *numbers) for layer, numbers in layers.items())
    return Accounting(content, by_layer)


def _content(suffix: str) -> str:
    if not suffix:
        return "exact tensors"
    return _CONTENT.get(suffix) or ("scales" if suffix.endswith("_scale") else "codes")


def layer_type(tensor: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `self_attn.q_proj`."""
    parts = [part for part in tensor.split(".") if not part.isdigit()]
    parts = [part for part in parts if part not in ("model", "layers", "weight", "transformer", "h")]
    return ".".join(parts) or tensor

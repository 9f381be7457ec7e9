"""Safetensors files: read tensor by tensor with plain reads, written whole.

`safetensors.safe_open` maps the whole file: two 5 GB shards of a checkpoint pair then count against a memory
limit although one tensor is in use. Here a tensor costs its own bytes, and a truncated file is told from a good one
before anything is read.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from meswitch.durable import replacing
from meswitch.errors import CheckpointError, MeswitchError
from meswitch.jsonfile import disguise, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # of a checkpoint: one file, or several

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # numbers that are weights as they are
_HEADER_LIMIT = 100_000_000
_SHARD_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's bytes are. offset and nbytes count bytes in `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def read_bytes(self, start: int = 0, count: int | None = None) -> bytearray:
        """`count` of the tensor's raw bytes from `start` on (all of them by default)."""
        count = self.nbytes - start if count is None else count
        buffer = bytearray(count)
        self._read_into(memoryview(buffer), start)
        return buffer

    def sha256(self) -> str:
        """Hex SHA-256 of the tensor's raw bytes."""
        return hashlib.sha256(self.read_bytes()).hexdigest()

    def read(self, *, pinned: bool = False) -> Tensor:
        """The tensor, in host memory of its own. pinned: page-locked, which a GPU copies faster."""
        tensor = torch.empty(self.shape, dtype=self.dtype, pin_memory=pinned)
        if self.nbytes:
            self._read_into(tensor_bytes(tensor), 0)
        return tensor

    def _read_into(self, view: memoryview, start: int) -> None:
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.offset + start)
            done = 0
            while done < len(view):
                got = handle.readinto(view[done:])
                if not got:
                    raise MeswitchError(f"{self.file}: ends inside tensor {self.name}; fetch the file again")
                done += got


@dataclass(frozen=True, slots=True)
class BuiltTensor(TensorInfo):
    """A parameter that is made of several stored tensors, each time it is read.

    Args:
        make: gives it.
    """

    make: Callable[[], Tensor]

    def read_bytes(self, start: int = 0, count: int | None = None) -> bytearray:
        stop = self.nbytes if count is None else start + count
        return bytearray(tensor_bytes(self.make())[start:stop])

    def read(self, *, pinned: bool = False) -> Tensor:
        made = self.make().contiguous()
        return made.pin_memory() if pinned else made


def read_header(file: Path) -> dict[str, TensorInfo]:
    """All tensors of a safetensors file.

    Raises:
        MeswitchError: not a safetensors file, a dtype that is not read, fewer or more bytes than the header promises,
            or tensors that overlap.
    """
    return {info.name: info for info in _entries(file)}


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> name of the file that holds it, as an index of several files says.

    Args:
        file: `model.safetensors.index.json`.

    Raises:
        CheckpointError: damaged, without a `weight_map`, or one that names anything but safetensors files beside it.
    """
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(
            f"{file}: weight_map: missing or empty, so that nothing says which files hold the weights; "
            "fetch the file again, or remove it if model.safetensors holds them all"
        )
    for tensor, name in names.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise CheckpointError(
                f"{file}: weight_map: {tensor}: {name!r} is no name of a safetensors file in this directory"
            )
    return names


def _entries(file: Path) -> Iterator[TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_HEADER_LIMIT, size - 8):
            found = disguise(file) or "is not a safetensors file, or cut off in its header; fetch it again"
            raise MeswitchError(f"{file}: {found}")
        try:
            header = json.loads(handle.read(length))
            tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        except (ValueError, AttributeError, RecursionError):
            found = disguise(file) or "its header is not JSON; the file is damaged, fetch it again"
            raise MeswitchError(f"{file}: {found}") from None
    spans = []
    for name, value in tensors.items():
        try:
            dtype = DTYPES[value["dtype"]]
            shape = tuple(int(n) for n in value["shape"])
            begin, end = (int(n) for n in value["data_offsets"])
        except (KeyError, TypeError, ValueError):
            known = ", ".join(DTYPES)
            raise MeswitchError(
                f"{file}: tensor {name}: header {value!r} is not understood; dtypes: {known}; save the model in 16 bit"
            ) from None
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise MeswitchError(
                f"{file}: tensor {name}: {end - begin} bytes do not hold {value['dtype']} {list(shape)}"
            )
        if begin < 0 or 8 + length + end > size:
            raise MeswitchError(
                f"{file}: truncated: tensor {name} ends at byte {8 + length + end}, the file at {size}; fetch it again"
            )
        spans.append((begin, end, name))
        yield TensorInfo(name, dtype, shape, file, 8 + length + begin, end - begin)
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:  # the library of safetensors, which loads the model, refuses it too
            raise MeswitchError(
                f"{file}: tensor {name}: begins at byte {begin} of the data, the one before it ends at {reached}; the "
                "file is damaged, fetch it again"
            )
        reached = end
    if 8 + length + reached != size:
        raise MeswitchError(
            f"{file}: {size - 8 - length - reached} bytes follow its last tensor; the file is damaged, fetch it again"
        )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it is contiguous and on the host."""
    flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, readable as the umask says (safetensors makes it private)."""
    umask = os.umask(0)
    os.umask(umask)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        _sort_metadata(temporary)
        temporary.chmod(0o666 & ~umask)


class Shards:
    """The weights of a checkpoint as they are written: one file, or several with an index.

    Args:
        directory: to write them in; it holds no others.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pending: dict[str, Tensor] = {}
        self._files: list[Path] = []
        self._places: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor, and write those that are kept once they are many."""
        self._pending[name] = tensor
        if sum(kept.nbytes for kept in self._pending.values()) >= _SHARD_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write the rest, and the index if there are several files."""
        self._flush()
        if len(self._files) == 1:
            self._files[0].rename(self.directory / WEIGHTS)
            return
        index = {"metadata": {}, "weight_map": self._places}
        (self.directory / INDEX).write_text(json.dumps(index, indent=1))

    def _flush(self) -> None:
        if self._pending:
            file = self.directory / f"model-{len(self._files) + 1:05d}.safetensors"
            write_tensors(file, self._pending)
            self._files.append(file)
            self._places |= dict.fromkeys(self._pending, file.name)
            self._pending = {}


def _sort_metadata(file: Path) -> None:
    """Put the metadata in the order of their names, in place: safetensors writes them in another order each time."""
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = handle.read(length).decode()
        begin = len('{"__metadata__":')
        metadata, end = json.JSONDecoder().raw_decode(header, begin)
        ordered = json.dumps(dict(sorted(metadata.items())), separators=(",", ":"), ensure_ascii=False)
        found = header[begin:end].encode()
        if len(ordered.encode()) == len(found):  # it is another only if safetensors escapes what JSON need not
            handle.seek(8 + begin)
            handle.write(ordered.encode())


def read_metadata(file: Path) -> dict[str, str]:
    """What `write_tensors` was given beside the tensors.

    Raises:
        MeswitchError: as `read_header`.
    """
    read_header(file)
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        metadata: dict[str, str] = json.loads(handle.read(length)).get("__metadata__", {})
    return metadata

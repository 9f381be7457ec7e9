"""One expert's tensors in one flat buffer.

Host memory and a device slot use the same layout, so that loading an expert is a single copy and a slot's addresses
never change.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.artifact import Artifact, Entry, packed_from_parts
from meswitch.checkpoint import TIED_EMBEDDING, TIED_HEAD
from meswitch.codec import PackedDelta
from meswitch.codec.rows import expand_rows
from meswitch.errors import IncompatibleError
from meswitch.tensorfile import DTYPES

_ALIGNMENT = 256  # bytes; at least what a vectorised load and a DMA copy like
_NOT_SERVED = {"weight_shape", "row_index"}
_BY_ROW = {"weight_packed", "weight_scale", "salient_weight"}  # a slot has all rows, those without a change as zeros


@dataclass(frozen=True, slots=True)
class Place:
    """Where one stored tensor lies in the buffer, in bytes."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Layout:
    """places: tensor name -> suffix -> place. nbytes: of the whole buffer."""

    places: dict[str, dict[str, Place]]
    entries: dict[str, Entry]
    nbytes: int
    tied_head: bool

    @classmethod
    def of(cls, artifact: Artifact) -> "Layout":
        """Where each part of an artifact goes.

        Raises:
            IncompatibleError: a tensor is compressed by a method that no op reads.
        """
        places: dict[str, dict[str, Place]] = {}
        entries: dict[str, Entry] = {}
        offset = 0
        for name, entry in artifact.manifest.tensors.items():
            if entry.kind == "same":
                continue
            if entry.kind == "coded":
                raise IncompatibleError(
                    f"{artifact.directory}: {entry.method} is a baseline for comparison: it can be merged and "
                    "evaluated, not served; compress with the default method"
                )
            entries[name] = entry
            places[name] = {}
            for suffix, part in entry.stored.items():
                if suffix in _NOT_SERVED:
                    continue
                shape = (entry.base_rows, *part.shape[1:]) if suffix in _BY_ROW else part.shape
                dtype = DTYPES[part.dtype]
                places[name][suffix] = place = Place(offset, math.prod(shape) * dtype.itemsize, shape, dtype)
                offset += -(-place.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(places, entries, offset, artifact.manifest.expert.tied_head)

    def fill(self, artifact: Artifact, buffer: Tensor) -> None:
        """Read the artifact, checksums compared, into a [nbytes] uint8 host buffer."""
        for name, parts in self.places.items():
            for suffix, place in parts.items():
                tensor = artifact.read_stored(name, suffix)
                if tensor.shape != place.shape:
                    tensor = expand_rows(tensor, artifact.read_stored(name, "row_index"), place.shape[0])
                buffer[place.offset : place.offset + place.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)

    def views(self, buffer: Tensor) -> dict[str, PackedDelta | Tensor]:
        """The expert's tensors as views of a [>= nbytes] uint8 buffer: name -> delta or own values."""
        tensors: dict[str, PackedDelta | Tensor] = {}
        for name, parts in self.places.items():
            found = {
                suffix: buffer[p.offset : p.offset + p.nbytes].view(p.dtype).view(p.shape)
                for suffix, p in parts.items()
            }
            entry = self.entries[name]
            tensors[name] = packed_from_parts(entry, found) if entry.kind == "packed" else found[""]
        if self.tied_head and TIED_EMBEDDING in tensors:
            tensors[TIED_HEAD] = tensors[TIED_EMBEDDING]
        return tensors

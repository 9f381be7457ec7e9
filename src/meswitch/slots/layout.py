"""One expert's tensors in one flat buffer, for the embedded engine.

Host memory and a device slot use the same layout, so that loading an expert is a single copy and a slot's addresses
never change. Packed deltas lie there as the artifact stores them, or as the GPU kernels read them (`ops.layout`).

Slots in vLLM are laid out in another way (`vllm.arena`), for three reasons. Here every expert is known at start, and
each has offsets of its own: a slot is as large as the largest, whatever the tensors' order. There experts come later,
so each layer has a fixed place of a fixed size. There a layer is what vLLM made of several tensors (q, k and v in one
matrix, this rank's rows and columns only), here it is the stored tensor. And norms, biases and added tokens are read
there by operators inside CUDA graphs, from tables over all slots; here by Python, from one expert's tensors.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meswitch.artifact import Artifact, Entry, ReadAhead, delta_from_parts
from meswitch.checkpoint import TIED_EMBEDDING, TIED_HEAD
from meswitch.codec import Delta, ExactDelta, PackedDelta, packed_shape, unfold
from meswitch.codec.delta import BY_ROW, expand_rows
from meswitch.errors import ConfigError, IncompatibleError
from meswitch.ops.layout import Shape, write_by
from meswitch.tensorfile import DTYPES

_ALIGNMENT = 256  # bytes; at least what a vectorised load and a DMA copy like
_NOT_SERVED = {"weight_shape", "row_index"}
HEAD_TIED = {TIED_HEAD: TIED_EMBEDDING}
_KERNEL, _EXTRA = "kernel", "weight_extra"


@dataclass(frozen=True, slots=True)
class SlotPlace:
    """Where one stored tensor lies in the buffer, in bytes."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of one expert lies.

    Args:
        places: tensor name -> suffix -> place.
        entries: tensor name -> its entry in the manifest.
        shapes: of the packed deltas that lie as the kernels read them, under the suffix `_KERNEL`.
        nbytes: of the whole buffer.
        tied: names that are not stored -> the tensor that they share.
    """

    places: dict[str, dict[str, SlotPlace]]
    entries: dict[str, Entry]
    shapes: dict[str, Shape]
    nbytes: int
    tied: Mapping[str, str]

    @classmethod
    def of(
        cls, artifact: Artifact, *, kernel: bool | Container[str] = False, tied: Mapping[str, str] = HEAD_TIED
    ) -> "Layout":
        """Where each part of an artifact goes.

        Args:
            kernel: lay packed deltas out for the GPU kernels: all, none, or those of these names.
            tied: names that share another tensor where the artifact does not store them: the head, the embedding.

        Raises:
            IncompatibleError: a tensor is compressed by a method that no op reads. ConfigError: by sizes that no kernel
                reads; the message names the tensor and the backend that does.
        """
        places: dict[str, dict[str, SlotPlace]] = {}
        entries: dict[str, Entry] = {}
        shapes: dict[str, Shape] = {}
        offset = 0
        for name, entry in artifact.manifest.tensors.items():
            if entry.kind == "same":
                continue
            if entry.kind == "coded":
                raise IncompatibleError(
                    f"{artifact.directory}: {entry.method} is a baseline for comparison: it can be merged and "
                    "evaluated, not served; compress with the default method"
                )
            entries[name] = replace(entry, block=None)  # words lie as the signs that they are
            places[name] = {}
            wanted: list[tuple[str, tuple[int, ...], torch.dtype]] = []
            if entry.kind == "packed" and (kernel is True or (kernel is not False and name in kernel)):
                shapes[name] = _kernel_shape(artifact, name, entry)
                wanted.append((_KERNEL, (shapes[name].nbytes,), torch.uint8))
            for suffix, part in entry.stored.items():
                # a slot has all rows, those without a change as zeros
                if suffix not in _NOT_SERVED and (name not in shapes or suffix == _EXTRA):
                    shape = (entry.base_rows, *part.shape[1:]) if suffix in BY_ROW else part.shape
                    if suffix == "weight_packed":
                        shape = packed_shape(entry.base_rows, entry.matrix[1], entry.bits or 0)
                    wanted.append((suffix, shape, DTYPES[part.dtype]))
            for suffix, shape, dtype in wanted:
                places[name][suffix] = place = SlotPlace(offset, math.prod(shape) * dtype.itemsize, shape, dtype)
                offset += -(-place.nbytes // _ALIGNMENT) * _ALIGNMENT
        known = artifact.manifest.tensors
        shared = {name: source for name, source in tied.items() if name not in known and source in known}
        return cls(places, entries, shapes, offset, shared)

    def fill(self, artifact: Artifact, buffer: Tensor, device: torch.device | str = "cpu") -> None:
        """Read the artifact, checksums compared, into a [nbytes] uint8 host buffer.

        Args:
            device: where deltas are laid out as the kernels read them: a GPU is quicker at it.
        """
        with ReadAhead(artifact, self.shapes) as ahead:
            self._fill(artifact, ahead, buffer, torch.device(device))

    def _fill(self, artifact: Artifact, ahead: ReadAhead, buffer: Tensor, device: torch.device) -> None:
        for name, parts in self.places.items():
            for suffix, place in parts.items():
                target = buffer[place.offset : place.offset + place.nbytes]
                if suffix == _KERNEL:
                    delta = ahead.read(name)
                    assert isinstance(delta, PackedDelta)
                    write_by(device, delta, target)
                    continue
                tensor = artifact.read_stored(name, suffix)
                if suffix == "weight_packed" and (block := artifact.manifest.tensors[name].block) is not None:
                    tensor = unfold(tensor, self.entries[name].matrix[1], block)
                if tensor.shape != place.shape:
                    tensor = expand_rows(tensor, artifact.read_stored(name, "row_index"), place.shape[0])
                target[:] = tensor.contiguous().view(-1).view(torch.uint8)

    def views(self, buffer: Tensor) -> dict[str, Delta | ExactDelta | Tensor]:
        """The expert's tensors as views of a [>= nbytes] uint8 buffer: name -> delta or own values.

        Of deltas that lie as the kernels read them there are only the rows of added tokens, as `extra_name(name)`.
        """
        tensors: dict[str, Delta | ExactDelta | Tensor] = {}
        for name, parts in self.places.items():
            found = {
                suffix: buffer[p.offset : p.offset + p.nbytes].view(p.dtype).view(p.shape)
                for suffix, p in parts.items()
            }
            entry = self.entries[name]
            if name not in self.shapes:
                tensors[name] = found[""] if entry.kind == "dense" else delta_from_parts(entry, found)
            elif _EXTRA in found:
                tensors[extra_name(name)] = found[_EXTRA]
        for name, source in self.tied.items():
            for of in (str, extra_name):
                if of(source) in tensors:
                    tensors[of(name)] = tensors[of(source)]
        return tensors

    def kernel_places(self) -> dict[str, tuple[Shape, int]]:
        """Shape and offset of every delta that lies as the kernels read it, by the tensor it belongs to."""
        found = {name: (shape, self.places[name][_KERNEL].offset) for name, shape in self.shapes.items()}
        found |= {name: found[source] for name, source in self.tied.items() if source in found}
        return found


def extra_name(name: str) -> str:
    return f"{name}_extra"


def _kernel_shape(artifact: Artifact, name: str, entry: Entry) -> Shape:
    index = entry.stored.get("salient_index")
    salient = 0 if index is None else index.shape[0]
    try:
        return Shape.sized(entry.base_rows, entry.matrix[1], entry.bits or 0, entry.group_size, salient)
    except ConfigError as error:
        raise ConfigError(f"{artifact.directory}: {name}: {error}") from None

"""Where an expert's tensors lie: in one flat buffer of the embedded engine, and in the tables of both engines' slots.

Host memory and a device slot use the same layout, so that loading an expert is a single copy and a slot's addresses
never change. Packed deltas lie there as the artifact stores them, or as the GPU kernels read them (`ops.layout`); the
kernels look up in tables where each slot's delta of each layer is.

Slots in vLLM are laid out in another way (`vllm.arena`), for three reasons. Here every expert is known at start, and
each has offsets of its own: a slot is as large as the largest, whatever the tensors' order. There experts come later,
so each layer has a fixed place of a fixed size. There a layer is what vLLM made of several tensors (q, k and v in one
matrix, this rank's rows and columns only), here it is the stored tensor. And norms, biases and added tokens are read
there by operators inside CUDA graphs, from tables over all slots; here by Python, from one expert's tensors.
"""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from meswitch.artifact import Artifact, Entry, ReadAhead, delta_from_parts
from meswitch.checkpoint import TIED_EMBEDDING, TIED_HEAD
from meswitch.codec import Delta, ExactDelta, PackedDelta, packed_shape, unfold
from meswitch.codec.delta import BY_ROW, expand_rows
from meswitch.errors import ConfigError, IncompatibleError
from meswitch.ops.layout import ABSENT, Shape, SlotLinear, Variant, write_by
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
                if suffix != _KERNEL
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


class TableLayer(NamedTuple):
    """A linear layer that some expert changes. variant: what all its deltas fit."""

    rows: int
    in_features: int
    variant: Variant

    def refuses(self, shape: Shape) -> str | None:
        """Why a delta of this shape is not read here, None if it is."""
        two, one = shape.planes
        if (shape.rows, shape.in_features) != (self.rows, self.in_features):
            return f"shape: [{shape.rows}, {shape.in_features}], the slots take [{self.rows}, {self.in_features}]"
        if shape.group != self.variant.group:
            return f"group_size: {shape.group or None}, the slots take {self.variant.group or None}"
        if two > self.variant.two or (one and not self.variant.one):
            return f"bits: {shape.bits}, more than the slots were made for"
        if shape.salient > self.variant.salient:
            return f"salient: {shape.salient} channels, the slots take {self.variant.salient}"
        return None


class SlotTables:
    """One `SlotLinear` for every layer, all over the slots' memory.

    Args:
        memory: [bytes] uint8, of all slots.
        slots: how many there are.
        layers: by name.
    """

    def __init__(self, memory: Tensor, slots: int, layers: Mapping[str, TableLayer]) -> None:
        # a row for each layer, so that what a slot holds changes in one copy
        self.rows = torch.tensor(ABSENT, device=memory.device).repeat(len(layers), slots, 1)
        self.known = dict(layers)
        self.layers = {
            name: SlotLinear.over(memory, table, layer.rows, layer.in_features, layer.variant)
            for table, (name, layer) in zip(self.rows, layers.items(), strict=True)
        }

    def point(self, slot: int, places: Mapping[str, tuple[Shape, int]]) -> None:
        """Make a slot's entries those of the expert that was copied there. In the order of the current stream.

        Args:
            slot: which.
            places: shape and first byte in `memory` of each delta that the expert has; the others are absent.
        """
        rows = [places[name][0].table_row(places[name][1]) if name in places else ABSENT for name in self.layers]
        if rows:
            self.rows[:, slot].copy_(torch.tensor(rows), non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Of device memory."""
        return self.rows.nbytes + sum(layer.arrived.nbytes for layer in self.layers.values())


def table_layers(shapes: Iterable[tuple[str, Shape]]) -> dict[str, TableLayer]:
    """The layers that hold all these deltas.

    Args:
        shapes: of every expert's deltas, by tensor name.

    Raises:
        ConfigError: experts whose deltas of one tensor no kernel reads together; it names the tensor.
    """
    known: dict[str, list[Shape]] = {}
    for name, shape in shapes:
        known.setdefault(name, []).append(shape)
    layers = {}
    for name, found in known.items():
        try:
            layers[name] = TableLayer(found[0].rows, found[0].in_features, Variant.of(found))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return layers

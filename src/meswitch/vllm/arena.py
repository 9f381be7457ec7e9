"""Device memory of all slots: one layout for every expert, one copy to load one, addresses that never change.

The layout is vLLM's own, see `slots.layout` for why it is not the embedded engine's: a place of a fixed size for each
of vLLM's layers, as this rank has it. Tables, host tier and loader are those of `meswitch.slots`.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meswitch.artifact import Artifact, Entry
from meswitch.checkpoint import TIED_EMBEDDING, TIED_HEAD
from meswitch.errors import ConfigError, IncompatibleError
from meswitch.ops.layout import Shape, SlotLinear, padded_salient, salient_of_tiles
from meswitch.pagelock import copy
from meswitch.slots.layout import SlotTables, table_layers
from meswitch.units import format_bytes
from meswitch.vllm.places import EMBEDDING, HEAD, NORM, Place
from meswitch.vllm.support import norm_vector

Rename = Callable[[str], str]
_LEAST_GROUP = 16  # of the kernels, see `ops.layout`


@dataclass(frozen=True, slots=True)
class Layer:
    """One module's part of every slot.

    Args:
        place: where it is in the model.
        shape: of its packed delta, None if no expert has one here.
        slots: that delta of all slots.
        index: its row in the tables.
        offset: where it lies in a slot, in bytes.
        vectors: [slots + 1, width] float32, a norm's weights and biases or the change of a bias.
        vector: columns of the arena's vectors that these are.
        own: [slots, rows, features], an embedding's or head's values kept whole.
        has_own: [slots] bool.
        extra: [slots, extra rows, features], an expert's own tokens.
    """

    place: Place
    shape: Shape | None = None
    slots: SlotLinear | None = None
    index: int = 0
    offset: int = 0
    vectors: Tensor | None = None
    vector: tuple[int, int] | None = None
    own: Tensor | None = None
    has_own: Tensor | None = None
    extra: Tensor | None = None

    @property
    def is_switched(self) -> bool:
        """Whether some expert may change it."""
        return any(part is not None for part in (self.slots, self.vectors, self.own, self.extra))


@dataclass(frozen=True, slots=True)
class Prepared:
    """An expert in host memory, laid out as a slot.

    buffer: [slot_bytes] uint8. tables: [packed layers] rows of `Shape.table_row` at offset 0, None where absent.
    vectors: [width] float32. whole: by layer, what `own` and `extra` get. vocabulary: tokens that it has.
    """

    buffer: Tensor
    present: tuple[bool, ...]
    vectors: Tensor
    own: dict[str, Tensor]
    extra: dict[str, Tensor]
    vocabulary: int

    @property
    def nbytes(self) -> int:
        whole = [*self.own.values(), *self.extra.values()]
        return self.buffer.nbytes + self.vectors.nbytes + sum(tensor.nbytes for tensor in whole)


class Arena:
    """The slots.

    Args:
        models: what must fit, see `DeltaSettings.models`. extra_rows: tokens after the base's.
    """

    def __init__(
        self,
        places: Sequence[Place],
        models: Sequence[Artifact],
        rename: Rename,
        *,
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
        base_vocabulary: int,
        extra_rows: int = 0,
    ) -> None:
        self.count, self.device, self.base_vocabulary = slots, device, base_vocabulary
        known = [named_entries(model, rename, places) for model in models]
        beyond = [model.manifest.expert.vocab_size - base_vocabulary for model in models]
        self.extra_rows = max([extra_rows, *beyond])
        shapes: list[Shape | None] = [_shape(place, known) for place in places]
        self.slot_bytes = sum(shape.nbytes for shape in shapes if shape is not None)
        self.memory = torch.zeros(slots * self.slot_bytes, dtype=torch.uint8, device=device)
        named = [(place.name, shape) for place, shape in zip(places, shapes, strict=True) if shape is not None]
        self.tables = SlotTables(self.memory, slots, table_layers(named))
        self.base_vectors = torch.cat([_base_vector(place) for place in places] or [torch.zeros(0)])
        self.vectors = self.base_vectors.to(device).expand(slots + 1, -1).contiguous()
        self.sizes = torch.full((slots + 1,), base_vocabulary, dtype=torch.int32, device=device)
        self.layers: list[Layer] = []
        offset, index, column = 0, 0, 0
        for place, shape in zip(places, shapes, strict=True):
            options: dict[str, Any] = {}
            if shape is not None:
                linear = self.tables.layers[place.name]
                options = {"shape": shape, "slots": linear, "index": index, "offset": offset}
                offset, index = offset + shape.nbytes, index + 1
            width = _base_vector(place).numel()
            if width:
                span = column, column + width
                options |= {"vector": span, "vectors": self.vectors[:, span[0] : span[1]]}
                column = span[1]
            if place.kind in (EMBEDDING, HEAD):
                if any(_whole(place, names) for names in known):
                    options["own"] = torch.zeros(slots, place.used_rows, place.in_features, dtype=dtype, device=device)
                    options["has_own"] = torch.zeros(slots, dtype=torch.bool, device=device)
                if self.extra_rows > 0:
                    sizes = slots, self.extra_rows, place.in_features
                    options["extra"] = torch.zeros(*sizes, dtype=dtype, device=device)
            self.layers.append(Layer(place, **options))

    @property
    def nbytes(self) -> int:
        """Device memory of all slots."""
        whole = [tensor for layer in self.layers for tensor in (layer.own, layer.extra) if tensor is not None]
        return (
            self.memory.nbytes + self.tables.rows.nbytes + self.vectors.nbytes + sum(tensor.nbytes for tensor in whole)
        )

    def describe(self) -> str:
        return f"{self.count} slots of {format_bytes(self.nbytes // max(1, self.count))}"

    def drop(self, names: Collection[str]) -> list[Layer]:
        """Leave layers out from now on; their part of every slot stays empty."""
        dropped = [layer for layer in self.layers if layer.place.name in names]
        self.layers = [layer for layer in self.layers if layer.place.name not in names]
        return dropped

    def put(self, slot: int, expert: Prepared | None) -> None:
        """Copy an expert into a slot, or empty it. In the order of the computing stream."""
        if expert is None:
            self.tables.point(slot, {})
            self.vectors[slot].copy_(self.vectors[-1])
            self.sizes[slot] = self.base_vocabulary
            for layer in self.layers:
                if layer.has_own is not None:
                    layer.has_own[slot] = False
            return
        place = self.memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]
        copy(place, expert.buffer, non_blocking=True)
        places = {
            layer.place.name: (layer.shape, slot * self.slot_bytes + layer.offset)
            for layer in self.layers
            if layer.shape is not None and expert.present[layer.index]
        }
        self.tables.point(slot, places)
        self.vectors[slot].copy_(expert.vectors, non_blocking=True)
        self.sizes[slot] = expert.vocabulary
        for layer in self.layers:
            if layer.own is not None and layer.has_own is not None:
                own = expert.own.get(layer.place.name)
                layer.has_own[slot] = own is not None
                if own is not None:
                    layer.own[slot, : len(own)].copy_(own, non_blocking=True)
            if layer.extra is not None:
                more = expert.extra.get(layer.place.name)
                layer.extra[slot].zero_()
                if more is not None:
                    layer.extra[slot, : len(more)].copy_(more, non_blocking=True)


def stored_names(artifact: Artifact, rename: Rename, places: Iterable[Place]) -> dict[str, str]:
    """vLLM's name of a tensor -> the artifact's; a head that is not stored is the embedding that it is tied to.

    Raises:
        IncompatibleError: two tensors get one name.
    """
    found: dict[str, str] = {}
    for name in artifact.manifest.tensors:
        if (other := found.setdefault(rename(name), name)) != name:
            raise IncompatibleError(f"{artifact.directory}: {other} and {name} are one tensor in vLLM, {rename(name)}")
    for place in places:
        weight = f"{place.name}.weight"
        if place.tied is not None and weight not in found and f"{place.tied}.weight" in found:
            found[weight] = found[f"{place.tied}.weight"]
    if artifact.manifest.expert.tied_head and rename(TIED_HEAD) not in found and rename(TIED_EMBEDDING) in found:
        found[rename(TIED_HEAD)] = found[rename(TIED_EMBEDDING)]
    return found


def named_entries(artifact: Artifact, rename: Rename, places: Iterable[Place]) -> dict[str, Entry]:
    """An artifact's tensors by vLLM's names."""
    tensors = artifact.manifest.tensors
    return {name: tensors[stored] for name, stored in stored_names(artifact, rename, places).items()}


def _shape(place: Place, known: Sequence[dict[str, Entry]]) -> Shape | None:
    """Room for the packed delta that any of the models has here."""
    shapes = []
    for entries in known:
        packed = {}
        for source in place.sources:
            entry = entries.get(f"{source.module}.weight")
            if place.kind != NORM and entry is not None and entry.kind == "packed" and source.last > source.first:
                packed[source.module] = entry
        if not packed:
            continue
        groups, bits = [], 0
        for module, entry in packed.items():
            group = entry.group_size
            if place.columns is not None:
                group = cut_group(group, entry.shape[1], *place.columns, f"{module}.weight")
            groups.append(group)
            bits = max(bits, entry.bits or 0)
        group = joint_group(groups, place.in_features)
        own = [packed.get(source.module) for source in place.sources]
        counts = [0 if entry is None else _salient(entry) for entry in own]
        most = salient_of_tiles(counts, [source.last - source.first for source in place.sources])
        shapes.append(
            Shape(place.used_rows, place.in_features, bits, group or 0, padded_salient(min(most, place.in_features)))
        )
        if group is not None and group & (group - 1):
            raise ConfigError(f"{place.name}: group_size: {group}: the kernels take powers of two, or whole rows")
    return joint_shape(shapes) if shapes else None


def _salient(entry: Entry) -> int:
    """Salient channels of a packed tensor."""
    index = entry.stored.get("salient_index")
    return 0 if index is None else index.shape[0]


def _whole(place: Place, entries: dict[str, Entry]) -> bool:
    entry = entries.get(f"{place.sources[0].module}.weight")
    return entry is not None and entry.kind == "dense"


def _base_vector(place: Place) -> Tensor:
    """[width] float32: a norm's weights and biases, a bias's change of 0, or nothing."""
    if place.kind == NORM:
        return norm_vector(place.module)
    if place.kind != EMBEDDING and place.biased and place.bias is not None:
        return torch.zeros(place.rows)
    return torch.zeros(0)


def cut_group(group: int | None, in_features: int, first: int, last: int, name: str) -> int | None:
    """The group size of input channels `[first, last)`: the same where the cut is at a group's border, else finer."""
    if group is None or group >= in_features or (first // group == (last - 1) // group):
        return None
    finer = math.gcd(group, first) if last == in_features else math.gcd(group, first, last)
    if finer < _LEAST_GROUP:
        raise IncompatibleError(
            f"{name}: its {in_features} input channels are cut at {first} and {last}, within groups of {group}; use a "
            f"tensor-parallel size whose shares are multiples of {_LEAST_GROUP} channels, or compress with group_size "
            "'row'"
        )
    return finer


def joint_group(groups: Sequence[int | None], in_features: int) -> int | None:
    """The group size that every one of these can be written in.

    Raises:
        ConfigError: they have no common divisor that the kernels read.
    """
    real = [group for group in groups if group is not None and group < in_features]
    if not real:
        return None
    common = math.gcd(*real)
    if common < _LEAST_GROUP and common not in real:
        raise ConfigError(f"group_size: {sorted(set(real))} in one layer have no common divisor of {_LEAST_GROUP} up")
    return common


def joint_shape(shapes: Sequence[Shape]) -> Shape:
    """A place that any of these deltas of one layer can be written to: most bits, finest groups, most salient."""
    rows, width = shapes[0].rows, shapes[0].in_features
    group = joint_group([shape.group or None for shape in shapes], width)
    return Shape(rows, width, max(s.bits for s in shapes), group or 0, max(s.salient for s in shapes))

"""From an artifact on disk to a slot's layout in host memory.

vLLM keeps q, k and v as one matrix, and a rank's share of it: packed deltas are cut and joined alike. All of that is
exact. Codes of fewer bits are among those of more (level `2 c - (2^b - 1)`), a scale can be repeated for a finer group,
and a salient channel that a part does not have gets weights of 0.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meswitch.artifact import Artifact, ReadAhead
from meswitch.codec import EXACT, PackedDelta, pack, unpack
from meswitch.errors import ConfigError, IncompatibleError
from meswitch.ops.layout import write_by
from meswitch.pagelock import page_locked
from meswitch.vllm.arena import Arena, Layer, Prepared, Rename, cut_group, joint_group, stored_names
from meswitch.vllm.command import KEY, DeltaSettings
from meswitch.vllm.places import EMBEDDING, HEAD, NORM, Place, Source, Unserved

_SHOWN = 12  # layers that a refusal names


class Reader:
    """One artifact's tensors by vLLM's names; remembers which were asked for.

    Args:
        artifact: what is read.
        names: vLLM's name of a tensor -> the artifact's.
        order: names in the order in which they will be asked for.
    """

    def __init__(self, artifact: Artifact, names: Mapping[str, str], order: Iterable[str] = ()) -> None:
        self.artifact = artifact
        self.used: set[str] = set()
        self._names = names
        self.ahead = ReadAhead(artifact, [names[name] for name in order if name in names])
        self._last: tuple[str, PackedDelta | Tensor | None] = ("", None)

    def matrix(self, place: Place, source: Source) -> PackedDelta | Tensor | None:
        """A matrix's delta or own values, checksum compared; None where it is the base's."""
        rows_vary = place.kind in (EMBEDDING, HEAD)  # an expert's vocabulary may be larger or smaller
        return self._get(f"{source.module}.weight", place.stored_shape(source), rows_vary)

    def vector(self, name: str, base: Tensor, part: slice, size: int) -> Tensor:
        """A norm's weights, or a bias, as the expert has them.

        Args:
            name: of the tensor.
            base: [part] the base's values.
            part: this rank's elements.
            size: of all ranks.

        Returns:
            [part] float32, on the host.
        """
        value, own = self._get(name, (size,)), base.detach().float().cpu().reshape(-1)
        if isinstance(value, PackedDelta):  # norms of several heads are matrices in a checkpoint
            return own + value.dequantize().float().cpu().reshape(-1)[part]
        return own if value is None else value.float().reshape(-1)[part]

    def skip(self, name: str) -> None:
        """Say that another rank has this tensor."""
        if name in self._names:
            self.used.add(self._names[name])

    def _get(self, name: str, shape: tuple[int, ...], rows_vary: bool = False) -> PackedDelta | Tensor | None:
        stored = self._names.get(name)
        if stored is None:
            return None
        entry = self.artifact.manifest.tensors[stored]
        where = f"{self.artifact.directory}: {stored}"
        if entry.kind == "coded":
            raise IncompatibleError(
                f"{where}: compressed by a baseline for comparison, which cannot be served; compress with the default "
                "method"
            )
        if entry.kind == "lowrank":
            raise IncompatibleError(
                f"{where}: a low-rank pair, which vLLM's slots do not hold. vLLM serves adapters itself: give it the "
                "PEFT directory that this was made from. An embedding that was compressed to a pair has codes with "
                "a larger target_bpw; the embedded engine serves both"
            )
        found = entry.matrix if entry.kind == "packed" else entry.shape  # of GPT-2 the one is the other, transposed
        found = found if len(shape) > 1 else (math.prod(entry.shape),)
        if found[rows_vary:] != shape[rows_vary:]:
            raise IncompatibleError(f"{where}: shape: {list(entry.shape)}, vLLM's {name} takes {list(shape)}")
        self.used.add(stored)
        if self._last[0] != stored:  # vLLM's q, k and v may be one stored matrix
            value = self.ahead.read(stored)
            self._last = stored, value if isinstance(value, PackedDelta | Tensor) else None
        return self._last[1]

    def unused(self) -> list[str]:
        """Tensors that the expert changes and nothing asked for."""
        return [name for name in _changed(self.artifact) if name not in self.used]


@dataclass(frozen=True, slots=True)
class Target:
    """The model that experts are prepared for.

    Args:
        places: the layers whose deltas are served.
        unserved: those that no expert may change.
        rename: from a checkpoint's name of a tensor to vLLM's.
        settings: say what an expert may change without effect.
        elsewhere: names of modules that other pipeline ranks have.
    """

    places: Sequence[Place]
    unserved: Sequence[Unserved]
    rename: Rename
    settings: DeltaSettings
    elsewhere: tuple[str, ...] = ()

    def leaves_out(self, stored: str) -> bool:
        """Whether a tensor needs no place in this rank's slots."""
        return self.rename(stored).startswith(self.elsewhere) or self.settings.allows(stored)


def prepare(artifact: Artifact, arena: Arena, target: Target) -> Prepared:
    """Read an artifact and lay it out.

    Raises:
        ArtifactError: damaged. ConfigError: it does not fit the slots. IncompatibleError: it changes a tensor that
            nothing here serves.
    """
    check_covered(artifact, target)
    names = stored_names(artifact, target.rename, target.places)
    asked = [name for place in target.places for name in place.tensors if place.biased or not name.endswith(".bias")]
    reader = Reader(artifact, names, asked)
    with reader.ahead:
        prepared = _prepare(artifact, arena, reader)
    left = [name for name in reader.unused() if not target.leaves_out(name)]
    if left:  # not reached: what is covered is asked for
        raise IncompatibleError(f"{artifact.directory}: {', '.join(left)}: has no place in a slot")
    return prepared


def _prepare(artifact: Artifact, arena: Arena, reader: Reader) -> Prepared:
    vocabulary = artifact.manifest.expert.vocab_size
    if vocabulary > arena.base_vocabulary + max(0, arena.extra_rows):
        raise ConfigError(
            f"{artifact.directory}: has {vocabulary - arena.base_vocabulary} tokens more than the base, the slots were "
            f"made for {max(0, arena.extra_rows)}: add it to additional_config.{KEY}.experts, or set extra_rows"
        )
    buffer = page_locked(arena.slot_bytes, arena.device)  # what is absent is never read
    vectors = arena.base_vectors.clone()
    present = [False] * len(arena.tables.rows)
    own: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for layer in arena.layers:
        place = layer.place
        if place.kind == NORM:
            _norm(vectors, layer, reader)
            continue
        if layer.vector is not None:
            _bias(vectors, layer, reader)
        elif not place.biased:
            for source in place.sources:
                reader.skip(f"{source.module}.bias")
        values = [reader.matrix(place, source) for source in place.sources]
        if place.kind in (EMBEDDING, HEAD):
            if not _vocabulary(values[0], layer, own, extra):
                raise ConfigError(_no_room(artifact, place.name))
            values = [value if isinstance(value, PackedDelta) else None for value in values]
        if layer.shape is None or any(isinstance(value, Tensor) for value in values):
            if any(value is not None for value in values):
                raise ConfigError(_no_room(artifact, place.name))
            continue
        parts, rows = [], []
        for value, source in zip(values, place.sources, strict=True):
            part = value if isinstance(value, PackedDelta) else None
            have = source.last if part is None else max(source.first, min(source.last, part.rows))
            if part is not None:
                part = on_device(take_rows(part, source.first, have), arena.device)  # laying out is quick on a GPU
                if place.columns is not None:
                    part = take_columns(part, *place.columns, f"{source.module}.weight")
            parts += [part, None]
            rows += [have - source.first, source.last - have]
        joined = join(parts, rows)
        if joined is None:
            continue
        try:
            fitted = conform(joined, layer.shape.bits, layer.shape.group or None)
            target = buffer[layer.offset : layer.offset + layer.shape.nbytes]
            write_by(arena.device, fitted, target, layer.shape)
        except ConfigError as error:
            raise ConfigError(f"{_no_room(artifact, place.name)} ({error})") from None
        present[layer.index] = True
    return Prepared(buffer, tuple(present), vectors, own, extra, vocabulary)


def _vocabulary(
    value: PackedDelta | Tensor | None, layer: Layer, own: dict[str, Tensor], extra: dict[str, Tensor]
) -> bool:
    """Keep what of an embedding or a head is whole; False if the slots have no room for it."""
    source = layer.place.sources[0]
    more: Tensor | None = None
    if isinstance(value, Tensor):
        if layer.own is None:
            return False
        own[layer.place.name] = value[source.first : source.last].to(layer.own.dtype)
        more = value[source.rows :]
    elif isinstance(value, PackedDelta):
        more = value.extra
    if more is None or not len(more):
        return True
    if layer.extra is None:
        return False
    extra[layer.place.name] = more.to(layer.extra.dtype)
    return True


def _norm(vectors: Tensor, layer: Layer, reader: Reader) -> None:
    """A norm's weights, then its biases."""
    (source,), parts = layer.place.sources, []
    for leaf in ("weight", "bias"):
        base = getattr(layer.place.module, leaf, None)
        if base is not None:
            part = slice(source.first, source.last)
            parts.append(reader.vector(f"{source.module}.{leaf}", base, part, source.rows))
    _vector(vectors, layer, torch.cat(parts))


def _bias(vectors: Tensor, layer: Layer, reader: Reader) -> None:
    """How the bias of a layer changes; where it is the base's, by 0."""
    base, at = layer.place.bias.detach().float().cpu(), 0
    change = torch.zeros_like(base)
    for source in layer.place.sources:
        mine = slice(at, at + source.last - source.first)
        part = slice(source.first, source.last)
        change[mine] = reader.vector(f"{source.module}.bias", base[mine], part, source.rows) - base[mine]
        at = mine.stop
    _vector(vectors, layer, change)


def _vector(vectors: Tensor, layer: Layer, values: Tensor) -> None:
    if layer.vector is not None:
        vectors[layer.vector[0] : layer.vector[1]] = values


def _no_room(artifact: Artifact, module: str) -> str:
    return (
        f"{artifact.directory}: {module}: does not fit the slots, whose size was fixed at start: add this artifact to "
        f"additional_config.{KEY}.experts, or set bits, group_size and salient there"
    )


def check_covered(artifact: Artifact, target: Target) -> None:
    """Refuse an expert that changes a tensor which has no place in a slot; nothing is read for it.

    Raises:
        IncompatibleError: naming each such layer, its class and the reason, in one line for layers that are alike; or
            an exact artifact.
    """
    if artifact.manifest.method.name == EXACT:
        raise IncompatibleError(
            f"{artifact.directory}: method: exact (`--bits exact`): vLLM computes with packed deltas; compress with "
            "--bits 1 to 4, serve it with the embedded engine, or merge it (`meswitch merge`) and serve it alone"
        )
    names = stored_names(artifact, target.rename, target.places)
    asked = {name for place in target.places for name in place.tensors}
    covered = {stored for name, stored in names.items() if name in asked}
    left = [name for name in _changed(artifact) if name not in covered and not target.leaves_out(name)]
    if not left:
        return
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name in left:
        module, kind, reason = _why(target.rename(name), target)
        modules = by_reason.setdefault((kind, reason), [])
        if module not in modules:
            modules.append(module)
    lines = []
    for (kind, reason), modules in by_reason.items():
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        lines.append(f"{modules[0]}{more}: {kind}: {reason}" if kind else f"{modules[0]}{more}: {reason}")
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more"]
    raise IncompatibleError(
        f"{artifact.directory}: changes layers that cannot be switched in this model; merge this expert (`meswitch "
        f"merge`) and serve it alone, or list their tensors in additional_config.{KEY}.allow_uncovered to serve it "
        "without them: " + "; ".join(lines)
    )


def _changed(artifact: Artifact) -> Iterator[str]:
    tensors = artifact.manifest.tensors
    return (name for name in sorted(tensors) if tensors[name].kind != "same")


def _why(name: str, target: Target) -> tuple[str, str, str]:
    """The module that a tensor belongs to, its class, and why it is not served."""
    owners = [layer for layer in target.unserved if layer.holds(name)]
    if not owners:  # a mixture's experts are one module inside the one that the checkpoint names
        around = name[: name.rfind("experts.") + len("experts.")] if "experts." in name else name
        owners = [layer for layer in target.unserved if layer.name.startswith(around)]
    if owners:
        owner = max(owners, key=lambda layer: len(layer.name))
        return owner.name, owner.kind, owner.reason
    module, _, leaf = name.rpartition(".")
    place = next((place for place in target.places if any(source.module == module for source in place.sources)), None)
    if place is not None:
        return place.name, type(place.module).__name__, f"takes no {leaf} of an expert"
    return name, "", "vLLM's model has no layer of this name"


def on_device(delta: PackedDelta, device: torch.device) -> PackedDelta:
    """Its codes, scales and salient channels there; extra rows stay where they are."""
    return replace(
        delta,
        packed=delta.packed.to(device),
        scale=delta.scale.to(device),
        salient_index=delta.salient_index.to(device),
        salient_weight=delta.salient_weight.to(device),
    )


def take_rows(delta: PackedDelta, first: int, last: int) -> PackedDelta:
    """Output channels `[first, last)`: what a column-parallel rank holds. Extra rows are left out."""
    return replace(
        delta,
        packed=delta.packed[first:last],
        scale=delta.scale[first:last],
        salient_weight=delta.salient_weight[first:last],
        extra=None,
    )


def take_columns(delta: PackedDelta, first: int, last: int, name: str) -> PackedDelta:
    """Input channels `[first, last)`: what a row-parallel rank holds.

    Raises:
        IncompatibleError: a cut within a group leaves groups smaller than the kernels read. It names the tensor.
    """
    group = cut_group(delta.group_size, delta.in_features, first, last, name)
    index = delta.salient_index
    kept = ((index >= first) & (index < last)).nonzero().view(-1)
    return replace(
        delta,
        packed=pack(unpack(delta.packed, delta.bits, delta.in_features)[:, first:last].contiguous(), delta.bits),
        scale=_scale_for(delta, group, first, last),
        salient_index=(index[kept] - first).int(),
        salient_weight=delta.salient_weight[:, kept],
        group_size=group,
        in_features=last - first,
        extra=None,
    )


def join(parts: Sequence[PackedDelta | None], rows: Sequence[int]) -> PackedDelta | None:
    """Deltas below one another, all with the same inputs.

    Args:
        parts: None for rows that do not change. rows: of each part.

    Returns:
        None if no part changes anything.
    """
    present = [part for part in parts if part is not None]
    if not present:
        return None
    width, bits = present[0].in_features, max(part.bits for part in present)
    device = present[0].packed.device
    group = joint_group([part.group_size for part in present], width)
    salient = torch.cat([part.salient_index for part in present]).unique().int()
    joined = []
    for part, count in zip(parts, rows, strict=True):
        if not count:
            continue
        if part is None:
            none = torch.zeros(count, width, dtype=torch.uint8, device=device)
            scale = torch.zeros(count, 1, dtype=present[0].scale.dtype, device=device)
            part = replace(
                present[0],
                packed=pack(none, bits),
                scale=scale,
                salient_index=salient[:0],
                salient_weight=present[0].salient_weight.new_zeros(count, 0),
                bits=bits,
                group_size=None,
            )
        joined.append(conform(part, bits, group, salient))
    return replace(
        joined[0],
        packed=torch.cat([part.packed for part in joined]),
        scale=torch.cat([part.scale for part in joined]),
        salient_weight=torch.cat([part.salient_weight for part in joined]),
        extra=None,
    )


def conform(delta: PackedDelta, bits: int, group: int | None, salient: Tensor | None = None) -> PackedDelta:
    """The same delta in more bits, finer groups and more salient channels.

    Raises:
        ConfigError: it does not fit.
    """
    if delta.bits > bits:
        raise ConfigError(f"bits: {delta.bits}, in a place made for {bits}")
    packed = delta.packed
    if delta.bits < bits:
        codes = unpack(delta.packed, delta.bits, delta.in_features)
        packed = pack(codes + ((1 << bits) - (1 << delta.bits)) // 2, bits)
    own = None if delta.group_size is None or delta.group_size >= delta.in_features else delta.group_size
    if own != group and (group is None or (own is not None and own % group)):
        raise ConfigError(f"group_size: {own or 'row'}, in a place made for {group or 'row'}")
    index, weight = delta.salient_index, delta.salient_weight
    if salient is not None:
        weight = weight.new_zeros(delta.rows, salient.numel())
        weight[:, torch.searchsorted(salient, index)] = delta.salient_weight
        index = salient
    return replace(
        delta,
        packed=packed,
        scale=_scale_for(delta, group, 0, delta.in_features),
        salient_index=index,
        salient_weight=weight,
        bits=bits,
        group_size=group,
    )


def _scale_for(delta: PackedDelta, group: int | None, first: int, last: int) -> Tensor:
    """The scales of input channels `[first, last)` in groups of `group`, which divides the delta's own."""
    if delta.group_size is None or delta.group_size >= delta.in_features:
        return delta.scale[:, :1].expand(-1, 1 if group is None else -(-(last - first) // group)).contiguous()
    starts = torch.arange(first, last, group or last - first, device=delta.scale.device)
    return delta.scale[:, starts // delta.group_size].contiguous()

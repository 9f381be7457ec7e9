"""From an artifact on disk to a slot's layout in host memory."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from meswitch.artifact import Artifact, ReadAhead
from meswitch.checkpoint import TIED_EMBEDDING, TIED_HEAD
from meswitch.codec import PackedDelta
from meswitch.errors import ConfigError, IncompatibleError
from meswitch.ops.layout import write_by
from meswitch.pagelock import page_locked
from meswitch.vllm.arena import Arena, Layer, Prepared, Rename
from meswitch.vllm.places import EMBEDDING, HEAD, NORM
from meswitch.vllm.settings import KEY, Settings
from meswitch.vllm.shard import conform, join, on_device, take_columns, take_rows


class Reader:
    """One artifact's tensors by vLLM's names; remembers which were asked for.

    Args:
        order: names in the order in which they will be.
    """

    def __init__(self, artifact: Artifact, rename: Rename, order: Iterable[str] = ()) -> None:
        self.artifact = artifact
        self.used: set[str] = set()
        self._names = {rename(name): name for name in artifact.manifest.tensors}
        if artifact.manifest.expert.tied_head and rename(TIED_HEAD) not in self._names:
            self._names[rename(TIED_HEAD)] = TIED_EMBEDDING
        self.ahead = ReadAhead(artifact, [self._names[name] for name in order if name in self._names])
        self._last: tuple[str, PackedDelta | Tensor | None] = ("", None)

    def get(self, name: str) -> PackedDelta | Tensor | None:
        """A tensor's delta or own values, checksum compared; None where it is the base's."""
        stored = self._names.get(name)
        if stored is None:
            return None
        if self.artifact.manifest.tensors[stored].kind == "coded":
            raise IncompatibleError(
                f"{self.artifact.directory}: {stored}: compressed by a baseline for comparison, which cannot be "
                "served; compress with the default method"
            )
        if self.artifact.manifest.tensors[stored].kind == "lowrank":
            raise IncompatibleError(
                f"{self.artifact.directory}: {stored}: a low-rank pair of an adapter; vLLM serves adapters itself: "
                "give it the PEFT directory that this was made from"
            )
        self.used.add(stored)
        if self._last[0] != stored:  # vLLM's q, k and v may be one stored matrix
            value = self.ahead.read(stored)
            self._last = stored, value if isinstance(value, PackedDelta | Tensor) else None
        return self._last[1]

    def unused(self) -> list[str]:
        """Tensors that the expert changes and nothing asked for."""
        tensors = self.artifact.manifest.tensors
        return sorted(name for name, entry in tensors.items() if entry.kind != "same" and name not in self.used)


def prepare(
    artifact: Artifact, arena: Arena, rename: Rename, settings: Settings, elsewhere: tuple[str, ...] = ()
) -> Prepared:
    """Read an artifact and lay it out.

    Args:
        elsewhere: names of modules that other pipeline ranks have.

    Raises:
        ArtifactError: damaged. ConfigError: it does not fit the slots. IncompatibleError: it changes a tensor that
            nothing here serves.
    """
    reader = Reader(artifact, rename, _order(arena))
    with reader.ahead:
        return _prepare(artifact, arena, reader, settings, elsewhere)


def _prepare(
    artifact: Artifact, arena: Arena, reader: Reader, settings: Settings, elsewhere: tuple[str, ...]
) -> Prepared:
    vocabulary = artifact.manifest.expert.vocab_size
    if vocabulary > arena.base_vocabulary + max(0, arena.extra_rows):
        raise ConfigError(
            f"{artifact.directory}: has {vocabulary - arena.base_vocabulary} tokens more than the base, the slots were "
            f"made for {max(0, arena.extra_rows)}: add it to additional_config.{KEY}.experts, or set extra_rows"
        )
    buffer = page_locked(arena.slot_bytes, arena.device)  # what is absent is never read
    vectors = arena.base_vectors.clone()
    present = [False] * len(arena.tables)
    own: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for layer in arena.layers:
        place = layer.place
        if place.kind == NORM:
            weight = reader.get(f"{place.name}.weight")
            if isinstance(weight, Tensor):
                _vector(vectors, layer, weight.float().view(-1))
            continue
        if layer.vector is not None:
            _bias(vectors, layer, reader)
        values = [reader.get(f"{source.module}.weight") for source in place.sources]
        if place.kind in (EMBEDDING, HEAD):
            _vocabulary(values[0], layer, own, extra)
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
    _refuse_uncovered(reader, settings, elsewhere)
    return Prepared(buffer, tuple(present), vectors, own, extra, vocabulary)


def _order(arena: Arena) -> Iterator[str]:
    """The names that `_prepare` asks for."""
    for layer in arena.layers:
        for source in layer.place.sources:
            if layer.vector is not None and layer.place.kind != NORM:
                yield f"{source.module}.bias"
        for source in layer.place.sources:
            yield f"{source.module}.weight"


def _vocabulary(
    value: PackedDelta | Tensor | None, layer: Layer, own: dict[str, Tensor], extra: dict[str, Tensor]
) -> None:
    """What of an embedding or a head is kept whole."""
    source = layer.place.sources[0]
    if isinstance(value, Tensor) and layer.own is not None:
        own[layer.place.name] = value[source.first : source.last].to(layer.own.dtype)
        more: Tensor | None = value[source.last :]
    elif isinstance(value, PackedDelta):
        more = value.extra
    else:
        more = None
    if layer.extra is not None and more is not None and len(more):
        extra[layer.place.name] = more.to(layer.extra.dtype)


def _bias(vectors: Tensor, layer: Layer, reader: Reader) -> None:
    """How the bias of a layer changes; where it is the base's, by 0."""
    base, at = layer.place.module.bias.detach().float().cpu(), 0
    change = torch.zeros_like(base)
    for source in layer.place.sources:
        count = source.last - source.first
        value = reader.get(f"{source.module}.bias")
        if isinstance(value, Tensor):
            change[at : at + count] = value[source.first : source.last].float() - base[at : at + count]
        at += count
    _vector(vectors, layer, change)


def _vector(vectors: Tensor, layer: Layer, values: Tensor) -> None:
    if layer.vector is not None:
        vectors[layer.vector[0] : layer.vector[1]] = values


def _no_room(artifact: Artifact, module: str) -> str:
    return (
        f"{artifact.directory}: {module}: does not fit the slots, whose size was fixed at start: add this artifact to "
        f"additional_config.{KEY}.experts, or set bits, group_size and salient there"
    )


def _refuse_uncovered(reader: Reader, settings: Settings, elsewhere: tuple[str, ...]) -> None:
    left = [name for name in reader.unused() if not name.startswith(elsewhere)] if elsewhere else reader.unused()
    refused = [name for name in left if not settings.allows(name)]
    if refused:
        shown = ", ".join(refused[:8]) + (f" and {len(refused) - 8} more" if len(refused) > 8 else "")
        raise IncompatibleError(
            f"{reader.artifact.directory}: changes tensors that cannot be switched in this model: {shown}; merge this "
            f"expert (`meswitch merge`) and serve it alone, or list them in additional_config.{KEY}.allow_uncovered "
            "to serve it without them"
        )

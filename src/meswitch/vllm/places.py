"""Where each tensor of a checkpoint lies in vLLM's model: which rows and columns of it a module of this rank holds.

Only layers whose class is known exactly have a place: a subclass may compute something else. Every other module that
holds weights is named with the reason why deltas of it are refused. The base's checkpoint, which may be quantised,
tells whether its rows lie as places say, and whether an artifact belongs to it (`Base`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.artifact import Artifact, fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.errors import IncompatibleError, listed
from meswitch.tensorfile import INDEX, WEIGHT_DTYPES, WEIGHTS, BuiltTensor, TensorInfo
from meswitch.vllm import compat
from meswitch.vllm.support import (
    CONVOLVES,
    MIXTURE,
    ORDERED,
    ROUTES,
    STATE_SPACE,
    STATE_SPACES,
    TABLE,
    TURNED,
    UNKNOWN,
    formula_of,
)

LINEAR, EMBEDDING, HEAD, NORM = "linear", "embedding", "head", "norm"
FUSED = "use_fused_embedding"  # of one rank of several on GPUs: the embedding reads its table without its method
_WRAPPED = ".base_layer"  # what vLLM's LoRA layers call the layer that they wrap
# Why layers are not served, by what their class's name holds, the first that fits.
_ROUTERS = ("Gate", "Router")
_REASONS = (
    (("MoE", "Experts"), MIXTURE),
    (STATE_SPACES, STATE_SPACE),
    (("Conv",), CONVOLVES),
    (_ROUTERS, ROUTES),
    (("Embedding",), TABLE),
    (("Norm",), "a norm whose formula is not known here"),
)
_WHOLE = (torch.bfloat16, torch.float16, torch.float32)
_ROWS = 8  # of each source, compared with the checkpoint's
_PROBES = 16
_NEAR = 0.02  # of the norm: what rounding to the served dtype may change
_QUANTISED = 0.3  # what a base that vLLM quantises as it loads may change; other rows differ by 1.4


@dataclass(frozen=True, slots=True)
class Source:
    """Rows `[first, last)` of a checkpoint's matrix, elements of a norm.

    Args:
        module: its name without `.weight`, as vLLM would write it.
        first: the first row of this rank.
        last: the one after its last.
        rows: all that the checkpoint's tensor has.
    """

    module: str
    first: int
    last: int
    rows: int


@dataclass(frozen=True, slots=True)
class Place:
    """One module of this rank.

    Args:
        name: of the module.
        module: vLLM's layer.
        kind: one of LINEAR, EMBEDDING, HEAD, NORM.
        sources: what its rows consist of, in order.
        rows: of the module, padding included.
        in_features: input channels of this rank, 1 for a norm.
        columns: which input channels of the checkpoint's these are, None for all.
        biased: this rank adds the bias.
        tied: the embedding whose weights a head shares.
        axis: of a norm's input, along which its tokens lie.
    """

    name: str
    module: Any
    kind: str
    sources: tuple[Source, ...]
    rows: int
    in_features: int
    columns: tuple[int, int] | None = None
    biased: bool = True
    tied: str | None = None
    axis: int = 0

    @property
    def used_rows(self) -> int:
        """Rows that the checkpoint has; vLLM pads vocabularies."""
        return sum(source.last - source.first for source in self.sources)

    @property
    def bias(self) -> Any:
        """The module's bias, None if it has none."""
        return getattr(self.module, "bias", None)

    @property
    def tensors(self) -> list[str]:
        """The tensors that it is made of, by vLLM's names, biases first."""
        leaves = ("weight",) if self.bias is None else ("bias", "weight")
        return [f"{source.module}.{leaf}" for leaf in leaves for source in self.sources]

    def stored_shape(self, source: Source) -> tuple[int, ...]:
        """What the checkpoint's tensor must be; of a norm the number of its elements."""
        if self.kind == NORM:
            return (source.rows,)
        return source.rows, self.in_features if self.columns is None else self._all_columns

    @property
    def _all_columns(self) -> int:
        return int(self.module.input_size)


@dataclass(frozen=True, slots=True)
class Unserved:
    """A module whose weights an expert cannot change.

    Args:
        name: of the module.
        kind: its class.
        reason: why.
        parts: the checkpoint's modules that it is made of, where they are others.
    """

    name: str
    kind: str
    reason: str
    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, place: Place, reason: str) -> "Unserved":
        """A layer that has a place and fails a test."""
        return cls(place.name, type(place.module).__name__, reason, tuple(source.module for source in place.sources))

    def holds(self, tensor: str) -> bool:
        """Whether a tensor is one of this module's, by vLLM's name."""
        return tensor.startswith(tuple(f"{name}." for name in (self.name, *self.parts)))


def survey(
    model: nn.Module, packed: Mapping[str, list[str]], stored: Collection[str] = ()
) -> tuple[list[Place], list[Unserved]]:
    """Every module whose delta can be served, and every other one that holds weights.

    Args:
        model: vLLM's, nothing is wrapped yet.
        packed: vLLM's `packed_modules_mapping`, such as `qkv_proj` -> `q_proj, k_proj, v_proj`.
        stored: names of the modules that the checkpoint has, as vLLM would write them. Some families store joined what
            vLLM says that it joins.
    """
    kinds = compat.layer_kinds()
    found: list[Place] = []
    unserved: list[Unserved] = []
    for full_name, module in model.named_modules():
        name = full_name.replace(_WRAPPED, "")
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        parts = _parts(name, packed, stored)
        place = None if "forward" in vars(module) else _place(name, module, parts, kinds)
        if place is None:
            unserved.append(Unserved(name, type(module).__name__, _reason(module, kinds), tuple(parts)))
        else:
            found.append(place)
    return _tied(found), unserved


def _parts(name: str, packed: Mapping[str, list[str]], stored: Collection[str]) -> list[str]:
    """The checkpoint's modules that a module is made of."""
    parent, dot, leaf = name.rpartition(".")
    parts = [f"{parent}{dot}{part}" for part in packed.get(leaf, [])]
    is_joined = name in stored and not any(part in stored for part in parts if part != name)
    return [name] if is_joined or not parts else parts


def _place(name: str, module: Any, parts: Sequence[str], kinds: compat.LayerKinds) -> Place | None:
    kind = type(module)
    if formula_of(module) is not None:
        size = module.weight.numel()
        rank, ranks = compat.rank_and_size() if module.weight.dim() > 1 else (0, 1)  # cut by heads
        return Place(name, module, NORM, (Source(name, rank * size, (rank + 1) * size, ranks * size),), size, 1)
    if kind in (kinds.embedding, kinds.head):
        if kind is kinds.embedding and not _is_table(module):
            return None
        return _vocabulary(name, module, HEAD if kind is kinds.head else EMBEDDING)
    if kind in (kinds.qkv, kinds.merged, kinds.column, kinds.row, kinds.replicated):
        return _linear(name, module, parts, kinds)
    return None


def _reason(module: nn.Module, kinds: compat.LayerKinds) -> str:
    name = type(module).__name__
    if "forward" in vars(module):
        return "its forward was replaced"
    if type(module) is kinds.embedding:
        return "a quantised table, whose rows cannot be switched; use a base in 16 bit"
    if type(module) in kinds:
        return "its rows are not those of the checkpoint's tensors one after another"
    known = next((kind.__name__ for kind in kinds if isinstance(module, kind)), None)
    if known is not None and not any(part in name for part in _ROUTERS):
        return f"not a plain {known}: its forward is its own"
    return next((reason for parts, reason in _REASONS if any(part in name for part in parts)), UNKNOWN)


def _is_table(module: Any) -> bool:
    """Whether an embedding's rows can be read one by one; they cannot if it is quantised."""
    weight = getattr(module, "weight", None)
    shape = (module.num_embeddings_per_partition, module.embedding_dim)
    return weight is not None and weight.shape == shape and weight.dtype.itemsize > 1


def _tied(places: Sequence[Place]) -> list[Place]:
    """Heads that share an embedding's weights are that embedding's."""
    owners = {_address(place): place.name for place in places if place.kind == EMBEDDING}
    owners.pop(0, None)
    return [replace(place, tied=owners.get(_address(place))) if place.kind == HEAD else place for place in places]


def _address(place: Place) -> int:
    weight = getattr(place.module, "weight", None)
    return 0 if weight is None else int(weight.data_ptr())


def _vocabulary(name: str, module: Any, kind: str) -> Place:
    shard = module.shard_indices
    source = Source(name, shard.org_vocab_start_index, shard.org_vocab_end_index, module.org_vocab_size)
    return Place(name, module, kind, (source,), module.num_embeddings_per_partition, module.embedding_dim)


def _linear(name: str, module: Any, parts: Sequence[str], kinds: compat.LayerKinds) -> Place | None:
    """None for a layer whose rows are of tensors that are not known."""
    rank, size = module.tp_rank, module.tp_size
    kind = type(module)
    if kind is kinds.row:
        share = module.input_size_per_partition
        columns = None if size == 1 else (rank * share, (rank + 1) * share)
        whole = (Source(name, 0, module.output_size, module.output_size),)
        return Place(name, module, LINEAR, whole, module.output_size, share, columns, biased=rank == 0)
    if kind is kinds.qkv:
        totals = [module.total_num_heads * module.head_size] + 2 * [module.total_num_kv_heads * module.head_size]
        shares = [module.num_heads * module.head_size] + 2 * [module.num_kv_heads * module.head_size]
        own = [rank] + 2 * [rank // module.num_kv_head_replicas]
    elif kind is kinds.merged:
        totals = list(module.output_sizes)
        shares, own = [total // size for total in totals], [rank] * len(totals)
    elif kind is kinds.column:
        totals, shares, own = [module.output_size], [module.output_size_per_partition], [rank]
    else:
        totals, shares, own = [module.output_size], [module.output_size], [0]
    children = list(parts)
    starts = [index * share for index, share in zip(own, shares, strict=True)]
    rows = list(totals)
    if len(children) == 1:  # stored as one matrix: the parts follow each other
        starts = [sum(totals[:i]) + start for i, start in enumerate(starts)]
        children, rows = children * len(totals), [sum(totals)] * len(totals)
    if len(children) != len(totals):
        return None
    sources = tuple(
        Source(child, start, start + share, every)
        for child, start, share, every in zip(children, starts, shares, rows, strict=True)
    )
    return Place(name, module, LINEAR, sources, sum(shares), module.input_size)


class Base:
    """The base of one server. source: its directory or hub id, as vLLM was started with."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._sums: dict[str, str] = {}

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.source)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._checkpoint)

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._checkpoint.tensors)

    def misplaced(self, places: Sequence[Place], rename: Callable[[str], str]) -> list[Unserved]:
        """Of these places, those whose weights are not the base's: see `misplaced`."""
        names: dict[str, str] = {}
        for name in self._checkpoint.tensors:
            names.setdefault(rename(name), name)
        return misplaced(places, self._checkpoint, names)

    def check(self, artifact: Artifact) -> None:
        """Refuse an artifact of another base, by content.

        Of a quantised base it is the content of what is not quantised: embeddings, norms, biases. FP8, GPTQ and plain
        rounding leave those as they are. AWQ and SmoothQuant move scales of input channels between norms and weights,
        and to such weights no delta can be added.

        Raises:
            IncompatibleError: naming what differs.
        """
        base, wanted = self._checkpoint, artifact.manifest.base
        if base.ignored_shards:
            raise IncompatibleError(
                f"{base.directory}: holds {WEIGHTS}, which {artifact.directory} was compressed against, and {INDEX} of "
                f"other files ({listed(base.ignored_shards)}), which vLLM loads; move the files away that are not meant"
            )
        if self._fingerprint == wanted.fingerprint or not base.is_quantised:
            artifact.check_base(base, known=self._fingerprint)
            return
        compared = 0
        for name, entry in artifact.manifest.tensors.items():
            info = base.info(name)
            if entry.role == "linear" or entry.base_sha256 is None or info is None or info.dtype not in _WHOLE:
                continue
            if isinstance(info, BuiltTensor):  # of codes: an embedding or a head may be quantised too
                continue
            if name not in self._sums:
                self._sums[name] = info.sha256()
            if self._sums[name] != entry.base_sha256:
                raise IncompatibleError(
                    f"{base.directory}: {name} is not that of {wanted.name!r}, against which {artifact.directory} was "
                    "compressed: another base, or quantised by a method that rescales channels (AWQ, SmoothQuant) or "
                    "converts other tensors too; use that base in 16 bit, FP8, GPTQ or rounded"
                )
            compared += 1
        if not compared:
            raise IncompatibleError(
                f"{base.directory}: quantised in whole, so that nothing says whether it is {wanted.name!r}, against "
                f"which {artifact.directory} was compressed; set check_base to false if it is"
            )


def misplaced(places: Sequence[Place], base: Checkpoint, names: Mapping[str, str]) -> list[Unserved]:
    """Layers whose weights are not the checkpoint's at the same place.

    Args:
        places: nothing is wrapped yet.
        base: what vLLM loaded; tensors that are quantised in it are not compared.
        names: vLLM's name of a tensor -> its name in the checkpoint.
    """
    found = []
    for place in places:
        reason = next(_differences(place, base, names), None)
        if reason is not None:
            found.append(Unserved.of(place, reason))
    return found


def _differences(place: Place, base: Checkpoint, names: Mapping[str, str]) -> Iterator[str]:
    at = 0
    for source in place.sources:
        count = source.last - source.first
        for leaf in ("weight", "bias"):
            info = _info(base, names, f"{source.module}.{leaf}")
            if info is None and leaf == "weight" and place.tied is not None:
                info = _info(base, names, f"{place.tied}.weight")
            if info is None or isinstance(info, BuiltTensor) or info.dtype not in WEIGHT_DTYPES or not count:
                continue  # there is none, or it is quantised
            compare = _vector if leaf == "bias" or place.kind == NORM else _matrix
            if (reason := compare(place, source, at, info, leaf)) is not None:
                yield reason
        at += count


def _short(info: TensorInfo) -> str:
    """A name without the layer's, so that layers which are alike are refused in one line."""
    return ".".join(info.name.split(".")[-2:])


def _info(base: Checkpoint, names: Mapping[str, str], name: str) -> TensorInfo | None:
    return base.info(names[name]) if name in names else None


def _vector(place: Place, source: Source, at: int, info: TensorInfo, leaf: str) -> str | None:
    own = getattr(place.module, leaf, None)
    if own is None:
        return f"the checkpoint has {_short(info)}, which the layer has not"
    stored = info.read().reshape(-1)
    if stored.numel() != source.rows:
        return f"{_short(info)} has {stored.numel()} elements in the checkpoint, the layer takes {source.rows}"
    mine = own.detach().reshape(-1)[at : at + source.last - source.first]
    if not _is_near(mine.float().cpu(), stored[source.first : source.last].to(own.dtype).float()):
        return f"{_short(info)} is another in the checkpoint: vLLM changes it as it loads it"
    return None


def _matrix(place: Place, source: Source, at: int, info: TensorInfo, leaf: str) -> str | None:
    wanted = place.stored_shape(source)
    if len(info.shape) == 3:
        return CONVOLVES
    if info.shape != wanted and info.shape == wanted[::-1]:
        return TURNED
    if info.shape != wanted:
        return f"{_short(info)} is {list(info.shape)} in the checkpoint, the layer takes {list(wanted)}"
    rows = torch.linspace(source.first, source.last - 1, _ROWS).round().long().unique()
    columns = slice(None) if place.columns is None else slice(*place.columns)
    stored = torch.stack([_row(info, int(row)) for row in rows])[:, columns]
    if _has_rows(place, rows - source.first + at, stored):
        return None
    is_square = info.shape[0] == info.shape[1]
    if is_square and _has_rows(place, rows - source.first + at, info.read().T[rows][:, columns]):
        return TURNED
    return ORDERED


def _row(info: TensorInfo, row: int) -> Tensor:
    size = info.shape[1] * info.dtype.itemsize
    return torch.frombuffer(info.read_bytes(row * size, size), dtype=info.dtype)


def _has_rows(place: Place, rows: Tensor, stored: Tensor) -> bool:
    """Whether these rows of a layer are `stored`, as they lie there or by what they make of some inputs."""
    module: Any = place.module
    weight: Any = getattr(module, "weight", None)
    is_plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    if is_plain and weight.shape == (place.rows, place.in_features):
        return _is_near(weight.detach()[rows.to(weight.device)].float().cpu(), stored.to(weight.dtype).float())
    # quantised, or on a CPU only as its kernels read it
    device = next(module.parameters()).device
    x = torch.randn(_PROBES, place.in_features, generator=torch.Generator().manual_seed(0))
    y = module.quant_method.apply(module, x.to(device, module.params_dtype), None)
    return _is_near(y.float().cpu()[:, rows], x @ stored.float().T, _NEAR if is_plain else _QUANTISED)


def _is_near(mine: Tensor, stored: Tensor, near: float = _NEAR) -> bool:
    return bool((mine - stored).norm() <= near * stored.norm() + 1e-12)

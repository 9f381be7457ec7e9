"""Where each tensor of a checkpoint lies in vLLM's model: which rows and columns of it a module of this rank holds.

Only layers whose class is known exactly have a place: a subclass may compute something else. Every other module that
holds weights is named with the reason why deltas of it are refused.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from meswitch.vllm import compat
from meswitch.vllm.support import CONVOLVES, MIXTURE, ROUTES, STATE_SPACE, STATE_SPACES, TABLE, UNKNOWN, formula_of

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

"""Where each tensor of a checkpoint lies in vLLM's model: which rows and columns of it a module of this rank holds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from meswitch.vllm import compat

LINEAR, EMBEDDING, HEAD, NORM = "linear", "embedding", "head", "norm"
_WRAPPED = ".base_layer"  # what vLLM's LoRA layers call the layer that they wrap


@dataclass(frozen=True, slots=True)
class Source:
    """Rows `[first, last)` of a checkpoint's matrix; `module` is its name without `.weight`, as vLLM would write it."""

    module: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Place:
    """One module of this rank.

    sources: what its rows consist of, in order. columns: its input channels, None for all. rows: of the module, padding
    included. biased: this rank adds the bias.
    """

    name: str
    module: Any
    kind: str
    sources: tuple[Source, ...]
    rows: int
    in_features: int
    columns: tuple[int, int] | None = None
    biased: bool = True

    @property
    def used_rows(self) -> int:
        """Rows that the checkpoint has; vLLM pads vocabularies."""
        return sum(source.last - source.first for source in self.sources)


def places(model: nn.Module, packed: Mapping[str, list[str]]) -> Iterator[Place]:
    """Every module whose delta can be served.

    Args:
        packed: vLLM's `packed_modules_mapping`, such as `qkv_proj` -> `q_proj, k_proj, v_proj`.
    """
    kinds = compat.layer_kinds()
    for full_name, module in model.named_modules():
        name = full_name.removesuffix(_WRAPPED)
        if isinstance(module, kinds.norms):
            if getattr(module, "weight", None) is not None and getattr(module, "has_weight", True):
                size = module.weight.numel()
                yield Place(name, module, NORM, (Source(name, 0, size),), size, size)
        elif isinstance(module, kinds.embedding):
            yield _vocabulary(name, module, HEAD if isinstance(module, kinds.head) else EMBEDDING)
        elif isinstance(module, kinds.linear):
            place = _linear(name, module, packed, kinds)
            if place is not None:
                yield place


def _vocabulary(name: str, module: Any, kind: str) -> Place:
    shard = module.shard_indices
    source = Source(name, shard.org_vocab_start_index, shard.org_vocab_end_index)
    return Place(name, module, kind, (source,), module.num_embeddings_per_partition, module.embedding_dim)


def _linear(name: str, module: Any, packed: Mapping[str, list[str]], kinds: compat.LayerKinds) -> Place | None:
    """None for a layer whose weights something else than the layer multiplies with."""
    rank, size = module.tp_rank, module.tp_size
    if isinstance(module, kinds.row):
        share = module.input_size_per_partition
        columns = None if size == 1 else (rank * share, (rank + 1) * share)
        whole = (Source(name, 0, module.output_size),)
        return Place(name, module, LINEAR, whole, module.output_size, share, columns, biased=rank == 0)
    if isinstance(module, kinds.qkv):
        totals = [module.total_num_heads * module.head_size] + 2 * [module.total_num_kv_heads * module.head_size]
        shares = [module.num_heads * module.head_size] + 2 * [module.num_kv_heads * module.head_size]
        own = [rank] + 2 * [rank // module.num_kv_head_replicas]
    elif isinstance(module, kinds.merged):
        totals = list(module.output_sizes)
        shares, own = [total // size for total in totals], [rank] * len(totals)
    elif isinstance(module, kinds.column):
        totals, shares, own = [module.output_size], [module.output_size_per_partition], [rank]
    else:
        totals, shares, own = [module.output_size], [module.output_size], [0]
    parent, dot, leaf = name.rpartition(".")
    children = [f"{parent}{dot}{child}" for child in packed.get(leaf, [])] or [name]
    starts = [index * share for index, share in zip(own, shares, strict=True)]
    if len(children) == 1:  # stored as one matrix: the parts follow each other
        starts = [sum(totals[:i]) + start for i, start in enumerate(starts)]
        children = children * len(totals)
    if len(children) != len(totals):
        return None
    sources = tuple(
        Source(child, start, start + share) for child, start, share in zip(children, starts, shares, strict=True)
    )
    return Place(name, module, LINEAR, sources, sum(shares), module.input_size)

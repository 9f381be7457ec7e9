"""What a PEFT adapter makes of a base: for each stored tensor a low-rank pair, its own values, or nothing."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.adapter.weights import Adapter, LowRankPair, Stack, StackPart, StackPartFinder, parameters_of, read_finite
from meswitch.architecture import (
    EMBEDDING,
    EXPERTS,
    HEAD,
    LIE_TRANSPOSED,
    LINEAR,
    ROUTER,
    TRANSPOSED,
    Architecture,
    Conversion,
    architecture_of,
    as_matrix,
    from_matrix,
    matrix_shape,
)
from meswitch.checkpoint import Checkpoint
from meswitch.codec import LowRankDelta
from meswitch.configuration import config_differences, read_config
from meswitch.errors import CheckpointError, IncompatibleError
from meswitch.tensorfile import TensorInfo

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class AdaptedTensor:
    """One tensor that an adapter changes.

    Args:
        name: the base's stored name.
        role: see `architecture`.
        shape: the expert's.
        kind: `lowrank` or `dense`.
        stored: suffix -> shape and dtype of what is stored if every row changed.
        scale: of a low-rank pair.
        make: reads it; None where it equals the base's.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    kind: str
    stored: Shapes
    scale: float | None
    make: Callable[[], LowRankDelta | Tensor | None]


@dataclass(frozen=True)
class Changes:
    """All that an adapter changes.

    Args:
        by_name: stored name -> change.
        vocabulary: tokens of the expert.
        tied: whether its head is its embedding.
        notes: what a person should know, a line each.
    """

    by_name: Mapping[str, AdaptedTensor]
    vocabulary: int
    tied: bool
    notes: tuple[str, ...]


@dataclass
class _Target:
    """What an adapter holds for one tensor of the base."""

    name: str
    role: str
    info: TensorInfo
    path: str  # of the module, in the model
    pair: LowRankPair | None = None
    tokens: TensorInfo | None = None
    whole: TensorInfo | None = None
    shift: tuple[TensorInfo, float] | None = None  # added to a bias
    stack: tuple[Stack, StackPart | None] | None = None  # a stack's pair; of one stored matrix, where it lies there

    @property
    def by_row(self) -> bool:
        """Whether the matrix has a row for each output of its pair; an embedding has a row for each token."""
        return self.role != EMBEDDING


@dataclass
class _Base:
    """A base's tensors by the names that an adapter uses."""

    adapter: Adapter
    base: Checkpoint
    architecture: Architecture
    targets: dict[str, _Target] = field(default_factory=dict)
    of_parameters: set[str] = field(default_factory=set)  # modules whose pair `target_parameters` names

    def __post_init__(self) -> None:
        self.plan = self.architecture.load_plan(self.base.tensors)
        self.finder = StackPartFinder(self.base.info, self.architecture)
        self.read = functools.lru_cache(maxsize=4)(read_finite)  # the matrices of a stack share a pair
        self.stored_of = {
            conversion.targets[0]: conversion.sources[0] for conversion in self.plan.conversions if conversion.renames
        }

    def add_all(self) -> None:
        """Find the base's tensor of everything that the adapter holds."""
        adapter = self.adapter
        named: list[tuple[str, str, Any]] = []
        stacked = parameters_of(adapter.config, adapter.pairs, self.architecture)
        for module, pair in adapter.pairs.items():
            if module in stacked:
                parameter = stacked[module]
                self.of_parameters.add(parameter.rpartition(".")[0])
                if len(self.architecture.parts[parameter].shape) == 3:
                    self._add_stack(parameter, pair)
                else:
                    named.append((parameter, "pair", replace(pair, module=parameter)))
                continue
            named.append((f"{module}.weight", "pair", pair))
            if pair.bias is not None:
                named.append((f"{module}.bias", "shift", (pair.bias, adapter.config.scale(module))))
        named += [(f"{module}.weight", "tokens", info) for module, info in adapter.tokens.items()]
        named += [(name, "whole", info) for name, info in adapter.whole.items()]
        plan = self.architecture.load_plan({name for name, _, _ in named})
        for name, part, value in named:
            target = self._target(name, plan.by_source.get(name))
            if getattr(target, part) is not None:
                raise adapter.error(f"{name}: two tensors for {target.name}; save one adapter to a directory")
            setattr(target, part, value)

    def _add_stack(self, parameter: str, pair: LowRankPair) -> None:
        stack = Stack.of(self.adapter.config, pair, parameter, self.architecture)
        path, stored = parameter.rpartition(".")[0], self.stored_of.get(parameter)
        pieces: Mapping[str, StackPart | None] | None
        if stored is not None:
            pieces, role = {stored: None}, self.architecture.parts[parameter].role
        else:
            conversion = next((c for c in self.plan.conversions if c.targets == (parameter,)), None)
            pieces, role = None if conversion is None else self.finder.pieces(conversion), LINEAR
        if pieces is None:
            raise self.adapter.error(
                f"{pair.module}: a pair for {parameter}, which the base stores in another way; merge the adapter with "
                "PEFT and compress the result"
            )
        for name, piece in pieces.items():
            self.targets[name] = _Target(name, role, self.base.tensors[name], path, stack=(stack, piece))

    def _target(self, name: str, conversion: Conversion | None) -> _Target:
        module, _, leaf = name.rpartition(".")
        if conversion is None:
            if leaf == "bias":
                raise self.adapter.error(f"{module}: has a bias, the base's module has none: it cannot be merged")
            trained = self.adapter.config.base_name
            was = "" if trained is None else f"; it was trained on {trained!r}"
            raise self.adapter.error(f"{module}: the base {self.base.directory} has no such module{was}")
        parameter = conversion.targets[0]
        if conversion.renames:
            stored, role = self._stored(parameter), self.architecture.parts[parameter].role
        else:  # one matrix of a mixture of experts
            stored, role = self._piece(name, conversion.targets), LINEAR
        if stored is None:
            raise self.adapter.error(
                f"{module}: the base stores {parameter} in other pieces; merge the adapter with PEFT and compress the "
                "result"
            )
        if stored not in self.targets:
            info = self.base.info(stored) or self.base.tensors[self.stored_of[self.architecture.tied[parameter]]]
            path = parameter.rpartition(".")[0]
            self.targets[stored] = _Target(stored, role, info, path)
        return self.targets[stored]

    def _stored(self, parameter: str) -> str | None:
        """The base's name of a parameter; of a tied one that is not stored, the name that it would have."""
        found = self.stored_of.get(parameter)
        return parameter if found is None and parameter in self.architecture.tied else found

    def _piece(self, name: str, targets: tuple[str, ...]) -> str | None:
        sources = [stored for stored, rule in self.plan.by_source.items() if rule.targets == targets]
        same = (s for s in sources if s == name or s.endswith(f".{name}") or name.endswith(f".{s}"))
        return next(same, None)


def changes_of(adapter: Adapter, base: Checkpoint) -> Changes:
    """What the adapter makes of this base.

    Args:
        base: with or without weights: nothing of it is read before a change is made.

    Raises:
        CheckpointError: the adapter holds something that this base has no place for.
        IncompatibleError: its shapes are not the base's, or the base is quantised.
    """
    if not base.holds_weights:
        raise IncompatibleError(
            f"{base.directory}/config.json: quantization_config: {base.unread_reason}; give the base in 16 bit"
        )
    _check_config(adapter, base)
    found = _Base(adapter, base.loaded, architecture_of(base.config))
    found.add_all()
    notes = _check_targets(adapter, found)
    made = {}
    for name, target in found.targets.items():
        _check_shape(adapter, target, found)
        made[name] = _change(adapter, target, found)
    vocabulary, tied = _vocabulary(adapter, found, made)
    return Changes(made, vocabulary, tied, (*adapter.config.notes, *notes))


def _check_config(adapter: Adapter, base: Checkpoint) -> None:
    """Refuse an adapter that brings the configuration of a model that computes otherwise than the base.

    Raises:
        IncompatibleError: naming the field. CheckpointError: the configuration cannot be read.
    """
    file = adapter.directory / "config.json"
    if not file.is_file():
        return
    own = read_config(file)
    if own.model_type != base.config.model_type:
        raise IncompatibleError(
            f"{file}: model_type: the adapter was trained on a {own.model_type!r}, the base is a "
            f"{base.config.model_type!r}"
        )
    for item in config_differences(base.config, own):
        if item.changes_computation and item.field.rpartition(".")[2] != "vocab_size":
            raise IncompatibleError(
                f"{file}: {item.field}: the adapter was trained with {item.expert!r}, the base has {item.base!r}; the "
                "model reads it, so they cannot share one batch"
            )


def _check_shape(adapter: Adapter, target: _Target, found: _Base) -> None:
    shape, grows = target.info.shape, target.path in (found.architecture.embedding, found.architecture.head)
    of_base = f"the base's {target.name} is {list(shape)}"
    if target.whole is not None:
        own = target.whole.shape
        if own != shape and not (grows and len(own) == 2 and own[1] == shape[1] and own[0] >= shape[0]):
            raise IncompatibleError(f"{target.whole.file}: {target.whole.name}: {list(own)}, {of_base}")
        shape = own
    if target.shift is not None and target.shift[0].shape != shape:
        raise IncompatibleError(f"{target.shift[0].file}: {target.shift[0].name}: not the shape of {target.name}")
    if target.tokens is not None:
        rows = _token_rows(adapter, target)
        if target.role not in (EMBEDDING, HEAD) or target.tokens.shape != (len(rows), shape[1]):
            raise IncompatibleError(
                f"{target.tokens.file}: {target.tokens.name}: {list(target.tokens.shape)}, but "
                f"trainable_token_indices names {len(rows)} rows and {of_base}"
            )
        if rows and max(rows) >= shape[0]:
            raise IncompatibleError(
                f"{adapter.config.file}: trainable_token_indices: {max(rows)}: {of_base}; save the adapter with "
                "`save_embedding_layers=True`"
            )
    pair = target.pair
    if target.stack is not None and (pair or target.whole or target.tokens or target.shift):
        raise adapter.error(f"{target.name}: has a pair of its own and one of {target.path}; merge it with PEFT")
    if pair is None:
        return
    if pair.a.shape[0] != adapter.config.rank_of(pair.module):
        raise adapter.error(
            f"{pair.module}: a pair of rank {pair.a.shape[0]}, but {adapter.config.file.name} says "
            f"{adapter.config.rank_of(pair.module)} (r, rank_pattern); the two files do not belong together"
        )
    if target.role not in (LINEAR, HEAD, ROUTER, TRANSPOSED, EMBEDDING) or len(shape) != 2:
        what = "a stack of matrices" if target.role == EXPERTS else f"a tensor of kind {target.role}"
        raise adapter.error(f"{pair.module}: a pair for {what} ({target.name}), which is not served")
    if pair.of_embedding != (target.role == EMBEDDING):
        raise adapter.error(f"{pair.module}: a pair of an {'embedding' if pair.of_embedding else 'linear layer'}")
    width, columns = pair.b.shape[0], pair.a.shape[1]
    own = (width, columns) if target.by_row else (columns, width)
    if own != matrix_shape(shape, target.role):
        raise IncompatibleError(
            f"{pair.a.file}: {pair.module}: a pair for {list(own)}, but {of_base}"
            + (f"; the adapter was trained on {adapter.config.base_name!r}" if adapter.config.base_name else "")
        )
    if pair.magnitude is not None and pair.magnitude.shape not in ((width,), (width, 1), (1, width)):
        raise IncompatibleError(f"{pair.a.file}: {pair.magnitude.name}: {list(pair.magnitude.shape)}, but {of_base}")


def _token_rows(adapter: Adapter, target: _Target) -> tuple[int, ...]:
    """Which rows were trained whole, as the configuration says."""
    for module, rows in adapter.config.token_indices.items():
        if module is None or target.path == module or target.path.endswith(f".{module}"):
            return rows
    raise adapter.error(f"{target.path}: has trained tokens, but trainable_token_indices does not name it")


def _change(adapter: Adapter, target: _Target, found: _Base) -> AdaptedTensor:
    """Choose how a tensor is kept."""
    base, info, pair = found.base, target.info, target.pair
    if target.stack is not None:
        return _of_stack(target, *target.stack, found)
    if pair is not None and target.tokens is not None:
        raise adapter.error(f"{target.path}: has a pair and trained tokens: merge it with PEFT and compress the result")
    shape = info.shape if target.whole is None else target.whole.shape
    extra = shape[0] - info.shape[0] if len(shape) == 2 else 0

    def theirs() -> Tensor:
        return base.read(target.name) if base.info(target.name) is not None else info.read()

    if pair is not None and pair.magnitude is None:
        return _low_rank(adapter, target, pair, shape, extra, theirs)
    if target.tokens is not None:
        return _tokens(adapter, target, shape, extra, theirs)
    dtype = info.dtype if target.whole is None or pair is not None else target.whole.dtype

    def make() -> Tensor | None:
        own = theirs() if target.whole is None else read_finite(target.whole)
        if pair is not None and pair.magnitude is not None:
            own = _with_magnitude(target, own, _delta(adapter, target, pair), pair.magnitude).to(dtype)
        if target.shift is not None:
            bias, scale = target.shift
            own = (own.float() + read_finite(bias).float() * scale).to(dtype)
        same = own.shape == info.shape and torch.equal(own.float(), theirs().float())
        return None if same else own

    return AdaptedTensor(target.name, target.role, shape, "dense", {"": (shape, dtype)}, None, make)


def _delta(adapter: Adapter, target: _Target, pair: LowRankPair) -> LowRankDelta:
    """A pair as it was trained, for the stored tensor as a matrix (`architecture.as_matrix`)."""
    a, b = read_finite(pair.a), read_finite(pair.b)
    left, right = (b, a) if target.by_row else (a.T.contiguous(), b.T.contiguous())
    return LowRankDelta(left, right, adapter.config.scale(pair.module))


def _of_stack(target: _Target, stack: Stack, piece: StackPart | None, found: _Base) -> AdaptedTensor:
    """A stack's pair, or a stored matrix's part of it."""
    shape, pair, rank = target.info.shape, stack.pair, stack.rank
    turned = stack.turned != (piece.transposed if piece is not None else target.role in LIE_TRANSPOSED)
    left, right = (pair.a.dtype, pair.b.dtype) if turned else (pair.b.dtype, pair.a.dtype)
    rows, columns = matrix_shape(shape, target.role)
    experts = stack.experts if piece is None else 1
    stored: Shapes = {"weight_left": ((rows, rank), left), "weight_right": ((experts * rank, columns), right)}

    def make() -> LowRankDelta | None:
        a, b = found.read(pair.a), found.read(pair.b)
        delta = stack.whole(target.role, a, b) if piece is None else piece.delta(stack, a, b)
        return delta if bool((delta.left != 0).any()) and bool((delta.right != 0).any()) else None

    return AdaptedTensor(target.name, target.role, shape, "lowrank", stored, stack.scale, make)


def _low_rank(
    adapter: Adapter,
    target: _Target,
    pair: LowRankPair,
    shape: tuple[int, ...],
    extra: int,
    theirs: Callable[[], Tensor],
) -> AdaptedTensor:
    (rows, columns), rank = matrix_shape(target.info.shape, target.role), pair.a.shape[0]
    left, right = (pair.b.dtype, pair.a.dtype) if target.by_row else (pair.a.dtype, pair.b.dtype)
    stored: Shapes = {"weight_left": ((rows, rank), left), "weight_right": ((rank, columns), right)}
    if extra:
        assert target.whole is not None
        stored["weight_extra"] = ((extra, columns), target.whole.dtype)

    def make() -> LowRankDelta | Tensor | None:
        delta = _delta(adapter, target, pair)
        if target.whole is None:
            return delta if bool((delta.left != 0).any()) and bool((delta.right != 0).any()) else None
        own = read_finite(target.whole)
        if not torch.equal(own[:rows].to(target.info.dtype), theirs()):
            return (own.float() + delta.dequantize()).to(own.dtype)  # the table under the pair was trained too
        added = (own[rows:].float() + delta.dequantize(torch.arange(rows, shape[0]))).to(own.dtype) if extra else None
        return LowRankDelta(delta.left[:rows], delta.right, delta.scale, added)

    return AdaptedTensor(target.name, target.role, shape, "lowrank", stored, adapter.config.scale(pair.module), make)


def _tokens(
    adapter: Adapter, target: _Target, shape: tuple[int, ...], extra: int, theirs: Callable[[], Tensor]
) -> AdaptedTensor:
    """Rows that replace the base's, as a pair whose left matrix picks them; many as the whole table."""
    rows, known, info = _token_rows(adapter, target), target.info.shape[0], target.tokens
    assert info is not None

    def table() -> Tensor:
        own, made = read_finite(info), theirs() if target.whole is None else read_finite(target.whole).clone()
        made[list(rows)] = own.to(made.dtype)
        return made

    picked = [(place, row) for place, row in enumerate(rows) if row < known]
    if 2 * len(picked) > shape[1]:  # in a slot the left matrix has all rows
        dtype = target.info.dtype if target.whole is None else target.whole.dtype
        return AdaptedTensor(target.name, target.role, shape, "dense", {"": (shape, dtype)}, None, table)
    stored: Shapes = {
        "weight_left": ((len(picked), len(picked)), torch.bfloat16),
        "weight_right": ((len(picked), shape[1]), torch.float32),
        "row_index": ((len(picked),), torch.int32),
    }
    if extra:
        assert target.whole is not None
        stored["weight_extra"] = ((extra, shape[1]), target.whole.dtype)

    def make() -> LowRankDelta | Tensor | None:
        own, ours = read_finite(info), theirs()
        whole = ours if target.whole is None else read_finite(target.whole)
        if not torch.equal(whole[:known].to(ours.dtype), ours):
            return table()
        left = torch.zeros(known, len(picked), dtype=torch.bfloat16)
        left[[row for _, row in picked], list(range(len(picked)))] = 1
        right = own[[place for place, _ in picked]].float() - ours[[row for _, row in picked]].float()
        added = whole[known:].clone() if extra else None
        if added is not None:
            beyond = [(place, row - known) for place, row in enumerate(rows) if row >= known]
            added[[row for _, row in beyond]] = own[[place for place, _ in beyond]].to(added.dtype)
        return LowRankDelta(left, right, 1.0, added)

    return AdaptedTensor(target.name, target.role, shape, "lowrank", stored, 1.0, make)


def _with_magnitude(target: _Target, base: Tensor, delta: LowRankDelta, magnitude: TensorInfo) -> Tensor:
    """DoRA: base + delta, each output's weights scaled to a length of their own, in float32."""
    moved = as_matrix(base, target.role).float() + delta.dequantize()
    factor = read_finite(magnitude).float().view(-1) / torch.linalg.norm(moved, dim=1 if target.by_row else 0)
    scaled = moved * (factor[:, None] if target.by_row else factor[None])
    return from_matrix(scaled, tuple(base.shape), target.role).contiguous()


def _vocabulary(adapter: Adapter, found: _Base, made: dict[str, AdaptedTensor]) -> tuple[int, bool]:
    """The expert's number of tokens, and whether its head is its embedding. Unties a head where it must be."""
    architecture, config = found.architecture, adapter.config
    names = {part: f"{getattr(architecture, part)}.weight" for part in ("embedding", "head")}
    stored = {part: found._stored(name) for part, name in names.items()}
    embedding, head = (made.get(stored[part] or "") for part in ("embedding", "head"))
    rows = found.base.config.get_text_config().vocab_size
    tied = names["head"] in architecture.tied
    own = [change.shape[0] for change in (embedding, head) if change is not None]
    if not tied and own and (len(set(own)) > 1 or (len(own) == 1 and own[0] != rows)):
        raise adapter.error(f"embedding and head have other numbers of tokens: {own}, the base {rows}")
    if not tied or (embedding is None and head is None):
        return (own or [rows])[0], tied
    follows = embedding is not None and head is None and not _untied(found, embedding, config.saves)
    if follows:
        assert embedding is not None
        return embedding.shape[0], True
    for part, change in (("embedding", embedding), ("head", head)):
        if change is None and own[0] != rows:
            raise adapter.error(f"the {part} lacks the added tokens: {own[0]} instead of {rows}")
    if len(set(own)) > 1:
        raise adapter.error(f"embedding and head have other numbers of tokens: {own}")
    return own[0], False


def _untied(found: _Base, embedding: AdaptedTensor, saves: Callable[[str], bool]) -> bool:
    """Whether PEFT changed the embedding alone, and not the head that shares its weights."""
    target = found.targets[embedding.name]
    return target.pair is not None or (target.whole is not None and target.tokens is None and saves(target.path))


def _check_targets(adapter: Adapter, found: _Base) -> list[str]:
    """Compare the modules that have a pair with those that the configuration names.

    Raises:
        CheckpointError: PEFT would not load a pair that is there, or a target has none at all.
    """
    from transformers.pytorch_utils import Conv1D

    config, modules = adapter.config, found.architecture.modules
    with_pair = {
        t.path: t.pair.module
        for t in found.targets.values()
        if t.pair is not None and t.path not in found.of_parameters
    }
    linear = {
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and name != found.architecture.head
    }
    shared = (found.architecture.embedding, found.architecture.head)
    for path, module in with_pair.items():
        names = {path, module} | (set(shared) if config.ties and path in shared else set())
        if path in modules and not any(config.targets(name, linear) for name in names):
            raise adapter.error(
                f"{module}: has a pair, but {config.file.name} does not name it (target_modules, exclude_modules, "
                "layers_to_transform), so PEFT would leave it out; make the two agree"
            )
    able = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)]
    given = {*with_pair, *found.of_parameters}
    missing = [name for name in able if name not in given and config.targets(name, linear)]
    for wanted in config.target_modules if isinstance(config.target_modules, tuple) else ():
        mine = [name for name in missing if name == wanted or name.endswith(f".{wanted}")]
        if mine and not any(path == wanted or path.endswith(f".{wanted}") for path in with_pair):
            raise CheckpointError(
                f"{config.file}: target_modules: {wanted}: no tensor of it is in the file ({mine[0]} and "
                f"{len(mine) - 1} more): the adapter is incomplete, fetch or save it again"
            )
    if not missing:
        return []
    return [
        f"{config.file}: target_modules: {missing[0]} and {len(missing) - 1} more have no pair: they stay the base's"
    ]

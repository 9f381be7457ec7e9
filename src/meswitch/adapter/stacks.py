"""Pairs of stacked matrices: what PEFT makes of `target_parameters`.

A mixture of experts is computed from parameters [experts, rows, columns]. PEFT trains one pair for all matrices of such
a stack, A [experts * rank, in] and B [out, rank * experts]. A base may store the stack as it is, or matrix by matrix:
then each gets the part of the pair that is its own.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.adapter.config import AdapterConfig
from meswitch.adapter.weights import Pair
from meswitch.architecture import LIE_TRANSPOSED, Architecture, Conversion
from meswitch.codec import LowRankDelta
from meswitch.errors import CheckpointError
from meswitch.tensorfile import TensorInfo

_NESTED = re.compile(r"(\.base_layer)*$")
_PROBED = 2  # experts: their matrices are stacked by one rule


def parameters_of(config: AdapterConfig, pairs: Mapping[str, Pair], architecture: Architecture) -> dict[str, str]:
    """Module as the adapter names it -> the parameter that its pair is for, where `target_parameters` names one.

    PEFT wraps a module once for each of its parameters, the first one innermost.

    Raises:
        CheckpointError: another number of pairs than of parameters.
    """
    nested: dict[str, dict[int, str]] = {}
    for module in pairs if config.target_parameters else ():
        bare = _NESTED.sub("", module)
        nested.setdefault(bare, {})[module.removeprefix(bare).count(".")] = module
    found: dict[str, str] = {}
    for bare, modules in nested.items():
        if bare not in architecture.modules:
            continue
        own = [f"{bare}.{name}" for name, _ in architecture.modules[bare].named_parameters(recurse=False)]
        named = [p for p in own if any(p == t or p.endswith(f".{t}") for t in config.target_parameters)]
        if not named:
            continue
        if sorted(modules) != list(range(len(named))):
            raise CheckpointError(
                f"{config.file}: target_parameters: {bare}: {len(named)} parameters ({', '.join(named)}), but "
                f"{len(modules)} pairs in the file; it is incomplete, save the adapter again"
            )
        found |= {modules[depth]: name for depth, name in enumerate(reversed(named))}
    return found


@dataclass(frozen=True)
class Stack:
    """A pair of all matrices of one parameter.

    Args:
        pair: its tensors.
        experts: how many matrices.
        rank: of each matrix's pair.
        scale: their factor.
        turned: whether the parameter is [experts, in, out].
    """

    pair: Pair
    experts: int
    rank: int
    scale: float
    turned: bool

    @classmethod
    def of(cls, config: AdapterConfig, pair: Pair, parameter: str, architecture: Architecture) -> "Stack":
        """The pair of a parameter, its shapes compared.

        Raises:
            CheckpointError: they are others than the parameter's.
        """
        experts, rows, columns = architecture.parts[parameter].shape
        turned = bool(getattr(architecture.modules[parameter.rpartition(".")[0]], "is_transposed", False))
        stack = cls(pair, experts, config.rank_of(parameter), config.scale(parameter), turned)
        outer, inner = (columns, rows) if turned else (rows, columns)
        wanted = (experts * stack.rank, inner), (outer, experts * stack.rank)
        if (pair.a.shape, pair.b.shape) != wanted:
            raise CheckpointError(
                f"{pair.a.file}: {pair.module}: a pair {list(pair.a.shape)}, {list(pair.b.shape)} for {parameter}, a "
                f"stack of {experts} matrices, where {list(wanted[0])}, {list(wanted[1])} is wanted (r, rank_pattern)"
            )
        return stack

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Of every matrix of the parameter: [experts, rows, rank] and [experts, rank, columns]."""
        right = a.view(self.experts, self.rank, -1)
        left = b.view(len(b), self.rank, self.experts).permute(2, 0, 1)
        return (right.mT, left.mT) if self.turned else (left, right)

    def whole(self, role: str, a: Tensor, b: Tensor) -> LowRankDelta:
        """For a base that stores the stack: the delta of the stack as a matrix (`architecture.as_matrix`)."""
        left, right = self.factors(a, b)
        if role in LIE_TRANSPOSED:
            left, right = right.mT, left.mT
        return LowRankDelta(_own(left.reshape(-1, self.rank)), _own(right.reshape(-1, right.shape[-1])), self.scale)


@dataclass(frozen=True)
class Piece:
    """Where a stored matrix lies in a stack.

    Args:
        expert: the matrix of the stack that it is in.
        rows: [n] int64, its rows there, in its order; its columns if it lies transposed.
        transposed: whether it does.
    """

    expert: int
    rows: Tensor
    transposed: bool

    def delta(self, stack: Stack, a: Tensor, b: Tensor) -> LowRankDelta:
        """Its part of a pair of the stack."""
        left, right = (factor[self.expert] for factor in stack.factors(a, b))
        left = left[self.rows]
        if self.transposed:
            left, right = right.T, left.T
        return LowRankDelta(_own(left), _own(right), stack.scale)


class PieceFinder:
    """Where stored matrices lie in the parameters that transformers stacks of them.

    It is tried with matrices that hold their own row and column numbers: the rule is transformers'.

    Args:
        info: gives a stored matrix by its name.
        architecture: the base's.
    """

    def __init__(self, info: Callable[[str], TensorInfo | None], architecture: Architecture) -> None:
        self._info, self._architecture = info, architecture
        # by patterns and shapes, which the layers of a model share: for each pattern rows, and whether it is transposed
        self._known: dict[object, dict[str, tuple[Tensor, bool]] | None] = {}

    def pieces(self, conversion: Conversion) -> dict[str, Piece] | None:
        """Each stored matrix of a conversion, None if it cannot be told where they lie."""
        assert conversion.patterns is not None
        by_pattern: dict[str, list[str]] = {}
        for name, pattern in zip(conversion.sources, conversion.patterns, strict=True):
            by_pattern.setdefault(pattern, []).append(name)
        few = {name: pattern for pattern, names in by_pattern.items() for name in names[:_PROBED]}
        shapes = {name: found.shape for name in few if (found := self._info(name)) is not None}
        if len(shapes) < len(few) or any(len(shape) != 2 for shape in shapes.values()):
            return None
        key = tuple(zip(few.values(), shapes.values(), strict=True))
        if key not in self._known:
            self._known[key] = self._tried(conversion, few, shapes)
        rules = self._known[key]
        if rules is None:
            return None
        return {
            name: Piece(expert, *rules[pattern])
            for pattern, names in by_pattern.items()
            for expert, name in enumerate(names)
        }

    def _tried(
        self, conversion: Conversion, few: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[Tensor, bool]] | None:
        small = Conversion(tuple(few), conversion.targets, tuple(few.values()), conversion.rule)
        step = max(max(shape) for shape in shapes.values()) + 1
        numbers = {name: number * step for number, name in enumerate(few)}

        def marked(axis: int) -> Tensor | None:
            def read(name: str) -> Tensor:
                places = torch.arange(shapes[name][axis], dtype=torch.float64)
                return (places[:, None] if axis == 0 else places).expand(shapes[name]) + numbers[name]

            made = small.build(read, self._architecture.model)
            found = made.get(conversion.targets[0])
            return found if len(made) == 1 and found is not None and found.dim() == 3 else None

        by_row, by_column = marked(0), marked(1)
        if by_row is None or by_column is None:
            return None
        rules: dict[str, tuple[Tensor, bool]] = {}
        experts: dict[str, int] = {}
        for name, pattern in few.items():
            expert = experts[pattern] = experts.get(pattern, -1) + 1
            found = _lies(by_row[expert] - numbers[name], by_column[expert] - numbers[name], shapes[name])
            if found is None:
                return None
            rules[pattern] = found
        return rules


def _own(part: Tensor) -> Tensor:
    """In memory of its own, which a file's tensors need."""
    return part.clone(memory_format=torch.contiguous_format)


def _lies(by_row: Tensor, by_column: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, bool] | None:
    """Which rows of a matrix [rows, columns] a stored one of this shape is; None if it is no such part of it.

    Args:
        by_row, by_column: the row and the column of the stored matrix at each place, outside of it other numbers.
    """
    inside = (by_row >= 0) & (by_row < shape[0]) & (by_column >= 0) & (by_column < shape[1])
    rows = inside.any(1).nonzero().view(-1)
    if not bool(inside[rows].all()) or not len(rows):
        return None
    across, along = by_row[rows], by_column[rows]
    for transposed, own, other in ((False, across, along), (True, along, across)):
        order = own[:, 0].argsort()
        expected = torch.arange(len(rows), dtype=own.dtype)[:, None].expand_as(own)
        columns = torch.arange(own.shape[1], dtype=own.dtype).expand_as(other)
        if torch.equal(own[order], expected) and torch.equal(other, columns):
            return rows[order], transposed
    return None

"""One delta matrix as a product of two thin ones: what a LoRA adapter is, and what is smallest where few directions
hold most of a delta.

The embedding of a fine-tune is such a delta: gradients through the softmax and Adam's steps of equal size move the rows
of all tokens that the text never showed in the same few directions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meswitch.codec.delta import check_finite, without_negligible
from meswitch.codec.feedback import damped

PAIR_DTYPE = torch.bfloat16
EXACT_WIDTH = 1024  # the smaller side of a matrix up to which all its singular values are computed
# Of a larger one a subspace is iterated: of the energy that a rank can keep, it keeps 99 % even where all singular
# values are nearly alike, and all but a thousandth where they fall as those of real deltas do.
_MORE, _ITERATIONS = 48, 8


@dataclass(frozen=True, slots=True)
class Rank:
    """How one matrix is stored as a pair of thin ones.

    Args:
        rank: columns of the one and rows of the other.
        row_floor: see `codec.Spec`.
    """

    rank: int
    row_floor: float = 0.0


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """The delta `scale * left @ right` of one [rows, in_features] matrix, or of a stack of matrices below one another.

    Args:
        left: [rows, rank], any float dtype.
        right: [rank, in_features], any float dtype; of a stack [matrices * rank, in_features].
        scale: the factor; kept apart, so that both matrices are those that were trained.
        extra: [extra_rows, in_features] rows after the base's last one, whole weights; None if there are none.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    extra: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.left.shape[0]

    @property
    def in_features(self) -> int:
        return self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def matrices(self) -> int:
        """How many lie below one another, each with a `right` of its own."""
        return self.right.shape[0] // self.rank if self.rank else 1

    def to(self, device: torch.device) -> "LowRankDelta":
        """The same delta on a device."""
        extra = None if self.extra is None else self.extra.to(device)
        return LowRankDelta(self.left.to(device), self.right.to(device), self.scale, extra)

    def tensors(self) -> dict[str, Tensor]:
        """By the suffix of their stored names. Rows of `left` that are all zero are left out if that saves bytes."""
        live = (self.left != 0).any(1)
        kept = int(live.sum())
        saved = (self.rows - kept) * self.rank * self.left.element_size()
        named = {"weight_left": self.left, "weight_right": self.right}
        if saved > kept * torch.int32.itemsize:
            index = live.nonzero().squeeze(1).to(torch.int32)
            named |= {"weight_left": self.left[index.long()], "row_index": index}
        if self.extra is not None:
            named["weight_extra"] = self.extra
        return named

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """The delta in float32, extra rows not included.

        Args:
            rows: [n] int64 to restore only these; None restores all.

        Returns:
            [rows, in_features] float32.
        """
        left = self.left if rows is None else self.left[rows]
        right = self.right.float()
        # the factor last, as PEFT merges: then the result is the same to the last bit
        if self.matrices == 1:
            return (left.float() @ right) * self.scale
        if rows is not None:
            raise ValueError("rows of a stack are not restored one by one")
        parts = left.float().view(self.matrices, -1, self.rank) @ right.view(self.matrices, self.rank, -1)
        return parts.view(self.rows, -1) * self.scale


def best_pair(delta: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The pair whose product is nearest to a matrix, its size shared by both sides.

    Args:
        delta: [rows, in_features] float32.
        moment: [in_features, in_features] float32, the second moment of the inputs: nearest is then what gives the
            nearest outputs. None: in the Frobenius norm.

    Returns:
        [rows, rank] and [rank, in_features] float32; columns beyond the matrix's own rank are zeros.
    """
    count = min(rank, *delta.shape)
    left = _directions(delta if moment is None else delta @ _root(moment), count)
    right = left.T @ delta  # for these directions of the outputs the best, whatever the inputs
    size = torch.linalg.vector_norm(right, dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    pad = (0, rank - count)
    return nn.functional.pad(left * size, pad), nn.functional.pad(right / size[:, None], (0, 0, *pad))


def _directions(matrix: Tensor, count: int) -> Tensor:
    """[rows, count]: its left singular vectors of the largest singular values."""
    if _is_exact(matrix.shape, count):
        return torch.linalg.svd(matrix, full_matrices=False)[0][:, :count]
    with torch.random.fork_rng([matrix.device] if matrix.device.type == "cuda" else []):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, _subspace(count), _ITERATIONS)[0][:, :count]


def _is_exact(shape: Sequence[int], count: int) -> bool:
    """Whether all singular vectors of a matrix are computed."""
    return min(shape) <= EXACT_WIDTH or 2 * _subspace(count) >= min(shape)


def _subspace(count: int) -> int:
    """The width of a subspace that so many singular vectors are found in."""
    return max(2 * count, count + _MORE)


def _root(moment: Tensor) -> Tensor:
    """A matrix `L` with `L L^T` the second moment, damped as far as float32 needs it."""
    for damping in (0.01, 0.1):
        lower, info = torch.linalg.cholesky_ex(damped(moment, damping))
        if not int(info):
            return lower
    return torch.diag(moment.diagonal().clamp_min(0).sqrt())


def pair_work(shape: Sequence[int], rank: int) -> int:
    """About how many operations `best_pair` takes of a matrix of this shape."""
    width = 20 * min(shape) if _is_exact(shape, rank) else 4 * _ITERATIONS * _subspace(rank)
    return math.prod(shape) * width


def pair_shapes(rows: int, in_features: int, rank: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `encode_pair` stores: suffix -> (shape, dtype)."""
    return {"weight_left": ((rows, rank), PAIR_DTYPE), "weight_right": ((rank, in_features), PAIR_DTYPE)}


def encode_pair(
    delta: Tensor, spec: Rank, *, name: str, second_moment: Tensor | None = None, extra: Tensor | None = None
) -> LowRankDelta:
    """The pair of a rank that is nearest to a delta, in bfloat16.

    Args:
        delta: [rows, in_features] float32.
        spec: its rank is cut to the smaller side of the matrix.
        name: of the tensor, for messages.
        second_moment: see `best_pair`.
        extra: [extra_rows, in_features], stored as it is.

    Raises:
        MeswitchError: the delta has NaN or infinite values.
    """
    check_finite(delta, name)
    if spec.row_floor:
        delta = without_negligible(delta, spec.row_floor)
    left, right = best_pair(delta, min(spec.rank, *delta.shape), second_moment)
    left = left.masked_fill((delta == 0).all(1, keepdim=True), 0.0)  # rows without a change stay exactly so
    return LowRankDelta(left.to(PAIR_DTYPE), right.to(PAIR_DTYPE), 1.0, extra)


def spectrum(delta: Tensor) -> Tensor:
    """Squared singular values of a matrix, falling: [min(rows, in_features)] float32, none below zero."""
    small = delta if delta.shape[0] <= delta.shape[1] else delta.T
    # of the Gram matrix: half the digits, and much quicker than the singular values themselves
    values: Tensor = torch.linalg.eigvalsh(small @ small.T)
    return values.flip(0).clamp_min(0)

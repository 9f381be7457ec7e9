"""What a model multiplies its matrices with, seen where it is done.

`Observer` looks at every matrix product of PyTorch while a model runs. A factor that lies in a parameter's memory is
that parameter, or one of the matrices of a stack, whatever class of module multiplies it; the other factor is its
inputs. So an expert of a mixture is seen with the tokens that reach it, without a word about mixtures here.

A checkpoint's matrix is often a part of a parameter: an expert's matrix in a stack, q in a fused q, k and v. Which part
is found by trial (`places_of`): transformers' own conversion is given row numbers instead of weights, and column
numbers after that.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meswitch.architecture import (
    HEAD,
    LIE_TRANSPOSED,
    LINEAR,
    TRANSPOSED,
    Architecture,
    Conversion,
    as_matrix,
    from_matrix,
    matrix_shape,
)
from meswitch.checkpoint import Checkpoint
from meswitch.compression.partial_model import PartialModel
from meswitch.cpu import rough_product
from meswitch.errors import CheckpointError, IncompatibleError

Shape = tuple[int, ...]
TOKENS_AT_ONCE = 4096  # that a block reads in one call
FILLED = 0.75  # of a batch's longest sequence, what the others have at least
_PRODUCTS = {  # operator -> which arguments are its factors
    torch.ops.aten.mm: (0, 1),
    torch.ops.aten.addmm: (1, 2),
    torch.ops.aten.bmm: (0, 1),
    torch.ops.aten.baddbmm: (1, 2),
}
_COLUMNS = 512  # of a second moment that are computed at once


@dataclass(frozen=True, slots=True)
class MatrixPlace:
    """Where a stored matrix lies in a parameter.

    Args:
        parameter: its name in the model.
        transposed: whether the parameter lies transposed as a matrix (`architecture.as_matrix`).
        rows: for each row of the stored matrix its row in the parameter's, -1 for one that is elsewhere: [rows] int64.
    """

    parameter: str
    transposed: bool
    rows: Tensor


def places_of(
    architecture: Architecture, conversion: Conversion, shapes: Mapping[str, Shape], roles: Mapping[str, str]
) -> dict[str, list[MatrixPlace]]:
    """Where the stored tensors of a conversion lie: stored name -> its places, usually one.

    Nothing is known of tensors that are no matrices, and of conversions that reorder columns or change values.

    Args:
        shapes: stored name -> shape.
        roles: stored name -> role.
    """
    if any(len(shapes[name]) < 2 for name in conversion.sources):
        return {}
    counts = {name: matrix_shape(shapes[name], roles[name])[0] for name in conversion.sources}
    if conversion.renames:
        (name,), (target,) = conversion.sources, conversion.targets
        return {name: [MatrixPlace(target, roles[name] in LIE_TRANSPOSED, torch.arange(counts[name]))]}
    starts = dict(zip(counts, itertools.accumulate(counts.values(), initial=0), strict=False))

    def row_numbers(name: str) -> Tensor:
        numbers = torch.arange(starts[name], starts[name] + counts[name])
        shape, role = shapes[name], roles[name]
        return from_matrix(numbers[:, None], _narrow(shape, _input_axis(role)), role)

    def column_numbers(name: str) -> Tensor:
        shape, role = shapes[name], roles[name]
        thin = _narrow(shape, -3 - _input_axis(role))
        return from_matrix(torch.arange(shape[_input_axis(role)]).expand(matrix_shape(thin, role)), thin, role)

    rows, columns = (_tried(architecture, conversion, read) for read in (row_numbers, column_numbers))
    found: dict[str, list[MatrixPlace]] = {}
    for target in conversion.targets:
        known = _oriented(architecture.parts[target].shape, rows.get(target), columns.get(target))
        if known is None:
            continue
        numbers, transposed = known
        for name, start in starts.items():
            here = ((numbers >= start) & (numbers < start + counts[name])).nonzero().view(-1)
            if len(here):
                places = torch.full((counts[name],), -1)
                places[numbers[here] - start] = here
                found.setdefault(name, []).append(MatrixPlace(target, transposed, places))
    return found


def assembly(
    places: Mapping[str, list[MatrixPlace]], target: str, shape: Shape
) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
    """How a parameter is put together from stored matrices, so that gradients pass; None if that is not known.

    Args:
        places: what `places_of` found for its conversion.
        target: the parameter.
        shape: its shape.

    Returns:
        from stored name -> matrix [rows, columns], to the parameter.
    """
    own = {name: place for name, found in places.items() for place in found if place.parameter == target}
    transposed = any(place.transposed for place in own.values())
    role = TRANSPOSED if transposed else LINEAR
    order = torch.full((matrix_shape(shape, role)[0],), -1)
    offset = 0
    for place in own.values():
        here = (place.rows >= 0).nonzero().view(-1)
        order[place.rows[here]] = here + offset
        offset += len(place.rows)
    if bool((order < 0).any()):
        return None
    in_order = len(order) == offset and torch.equal(order, torch.arange(offset))

    def put_together(matrices: Mapping[str, Tensor]) -> Tensor:
        rows = torch.cat([matrices[name] for name in own])
        return from_matrix(rows if in_order else rows[order.to(rows.device)], shape, role)

    return put_together


def _input_axis(role: str) -> int:
    """The dimension of a tensor of this role along which its inputs are."""
    return -2 if role in LIE_TRANSPOSED else -1


def _narrow(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], 1, *shape[axis:][1:])


def _tried(architecture: Architecture, conversion: Conversion, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    try:
        return conversion.build(read, architecture.model)
    except Exception:  # noqa: BLE001  a rule of transformers that needs tensors of their real sizes raises what it likes
        return {}


def _oriented(shape: Shape, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, bool] | None:
    """Row numbers of a parameter's matrix, and whether it lies transposed; None unless its columns are in order."""
    for role in (LINEAR, TRANSPOSED):
        axis = _input_axis(role)
        if rows is None or columns is None or tuple(rows.shape) != _narrow(shape, axis):
            continue
        ordered = as_matrix(columns, role)
        if ordered.shape[1] == shape[axis] and bool((ordered == torch.arange(shape[axis])).all()):
            return as_matrix(rows, role)[:, 0], role == TRANSPOSED
    return None


class Inputs:
    """Inputs [tokens, width] of a matrix, as their second moment.

    A few inputs are kept as they are: they take less memory than the moment, which is [width, width].

    Args:
        pairs: whether pairs of channels are of interest; if not, there are energies only.
    """

    def __init__(self, *, pairs: bool = True) -> None:
        self.tokens = 0
        self._pairs = pairs
        self._rows: list[Tensor] = []
        self._waiting = 0
        self._sum: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """inputs: [tokens, width]; copied if they are kept."""
        self.tokens += len(inputs)
        self._waiting += len(inputs)
        self._rows.append(inputs.clone())
        if not self._pairs or self._waiting >= inputs.shape[1]:
            self._fold()

    def _fold(self) -> Tensor:
        """The sum of `x^T x`, or of `x^2`, over all rows; of `x^T x` only what lies on and right of the diagonal."""
        if self._rows:
            rows = torch.cat(self._rows) if len(self._rows) > 1 else self._rows[0]
            if not self._pairs or rows.device.type != "cpu":
                rows = rows.float()  # a CPU multiplies what it computed in bfloat16 faster as it is
            width = rows.shape[1]
            if not self._pairs:
                new = rows.square().sum(0)
                self._sum = new if self._sum is None else self._sum + new
            else:
                if self._sum is None:
                    self._sum = rows.new_zeros(width, width, dtype=torch.float32)
                for start in range(0, width, _COLUMNS):  # symmetric: half the work
                    stop = min(start + _COLUMNS, width)
                    rough_product(rows[:, start:stop].T, rows[:, start:], onto=self._sum[start:stop, start:])
            self._rows, self._waiting = [], 0
        assert self._sum is not None
        return self._sum

    @cached_property
    def moment(self) -> Tensor:
        """`X^T X / n`, what it says of pairs of channels shrunk by `n / (n + width)`. Nothing can be added after.

        From few tokens that is mostly chance: unshrunk, error feedback from less than twice `width` tokens does more
        harm than none (shrinking a covariance towards its diagonal: Ledoit and Wolf, 2004; the weight is ours).

        Returns:
            [width, width] float32.

        Raises:
            IncompatibleError: inputs so large that their squares are not finite.
        """
        moment = self._fold()
        for start in range(0, len(moment), _COLUMNS):
            stop = min(start + _COLUMNS, len(moment))
            moment[stop:, start:stop] = moment[start:stop, stop:].T
        kept = moment.diagonal() / self.tokens
        if not bool(kept.isfinite().all()):
            raise IncompatibleError(
                "calibration: some activations are too large for their squares, though all are finite; compress "
                "without calibration (--calibration none)"
            )
        moment.mul_(1 / (self.tokens + len(moment)))
        moment.diagonal().copy_(kept)
        return moment

    @property
    def energy(self) -> Tensor:
        """Mean square of every input channel: [width] float32."""
        return self.moment.diagonal() if self._pairs else self._fold() / self.tokens


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a parameter's matrix.

    Args:
        parameter: its name.
        transposed: whether it lies transposed as this matrix.
        start: the first row.
        stop: the row after the last one.
    """

    parameter: str
    transposed: bool
    start: int
    stop: int


class Observer(TorchDispatchMode):
    """While it is entered, notes the inputs of all parameters that it knows.

    Args:
        parameters: name -> tensor, contiguous, of two or more dimensions, alone in its memory.
        pairs: see `Inputs`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, pairs: bool = True) -> None:
        super().__init__()
        self._pairs = pairs
        self.seen: dict[Rows, Inputs] = {}
        self._known = {tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in parameters.items()}
        self._recent: dict[Any, tuple[Tensor, Inputs]] = {}

    def __enter__(self) -> Any:
        self._recent = {}
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._recent = {}
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = _PRODUCTS.get(func.overloadpacket)
        if factors is not None:
            left, right = (args[place] for place in factors)
            self._see(right, left)
            self._see(left.mT, right.mT)
        return func(*args, **(kwargs or {}))

    def _see(self, weight: Tensor, inputs: Tensor) -> None:
        """A product `inputs @ weight`: [.., tokens, k] by [.., k, n]."""
        known = self._known.get(weight.untyped_storage().data_ptr())
        if known is None:
            return
        name, parameter = known
        if weight.dim() == 3 and weight.stride(0) == 0:  # one matrix, repeated for a batch
            weight, inputs = weight[0], inputs.flatten(0, 1)
        if weight.dim() == 2:
            self._note(_rows(name, parameter, weight), inputs)
            return
        for one, own in zip(weight, inputs, strict=True):
            # a stack that sees all tokens gets zeros for those that an expert does not take
            taken = own.any(1)
            self._note(_rows(name, parameter, one), own if bool(taken.all()) else own[taken])

    def _note(self, rows: Rows | None, inputs: Tensor) -> None:
        if rows is None or not len(inputs):
            return
        # q, k and v (gate and up) see the same tensor: its moment is computed once
        key = inputs.data_ptr(), inputs.shape, inputs.stride(), inputs._version
        _, same = self._recent.get(key, (None, None))
        found = self.seen.setdefault(rows, same or Inputs(pairs=self._pairs))
        if found is not same:
            found.add(inputs)
            self._recent[key] = inputs, found  # the tensor is kept, so that nothing else gets its memory


def _rows(name: str, parameter: Tensor, weight: Tensor) -> Rows | None:
    """Which rows of a parameter's matrix a factor [k, n] is; None if it is a part of them only."""
    height, width = parameter.shape[-2:]
    (k, n), (step, across), offset = weight.shape, weight.stride(), weight.storage_offset()
    if k == width and (step == 1 or k == 1) and (across == width or n == 1) and offset % width == 0:
        start = offset // width
        return Rows(name, False, start, start + n)
    if k == height and (step == width or k == 1) and (across == 1 or n == 1):
        first, column = divmod(int(offset), height * width)
        if column + n <= width:
            return Rows(name, True, first * width + column, first * width + column + n)
    return None


# stored name -> rows of its matrix, [n] int64, and what these are multiplied with
Seen = Mapping[str, Sequence[tuple[Tensor, Inputs]]]


class Walk:
    """Text on its way through a model, one decoder block after the other.

    Args:
        checkpoint: the model's weights.
        sequences: token ids.
        device: where the model computes.
        dtype: in which it computes.
        pairs: see `Inputs`.

    Raises:
        IncompatibleError: the model cannot be taken apart.
    """

    @torch.no_grad()
    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: list[list[int]],
        device: torch.device,
        dtype: torch.dtype,
        *,
        pairs: bool = True,
    ) -> None:
        self._pairs = pairs
        self._model = PartialModel(checkpoint, device, dtype)
        self._architecture, self._plan = self._model.weights.architecture, self._model.weights.plan
        self._shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        self._roles = self._architecture.roles(self._shapes)
        self._ids = [torch.tensor(batch, device=device) for batch in _batches(sequences)]
        self._calls = [self._model.calls(ids) for ids in self._ids]
        self._model.drop_frame()
        self._head = next((name for name, role in self._roles.items() if role == HEAD), None)
        blocks = dict.fromkeys(call.block for call in self._calls[0])
        self._inside = {block: self._stored_in(self._model.name(block)) for block in blocks}

    @property
    def order(self) -> list[str]:
        """The stored tensors in the order in which they are met."""
        return [name for names in self._inside.values() for name in names] + ([self._head] if self._head else [])

    def _stored_in(self, path: str) -> list[str]:
        rules = [rule for rule in self._plan.conversions if rule.targets[0].startswith(f"{path}.")]
        return [name for rule in rules for name in rule.sources]

    @torch.no_grad()
    def steps(self, done: Collection[str] = ()) -> Iterator[tuple[list[str], Seen]]:
        """Go all the way.

        Args:
            done: stored tensors that nobody asks for.

        Yields:
            for every block, and at last for the head, the names of its stored tensors and what they are multiplied
            with, as far as that was seen.

        Raises:
            CheckpointError: the weights are damaged. IncompatibleError: the model's own computation overflows.
        """
        told = set(done)
        given: list[Any] = [None] * len(self._ids)
        for number, call in enumerate(self._calls[0]):
            path, block = self._model.name(call.block), self._model.block(call.block)
            names = [name for name in self._inside[call.block] if name not in told]
            observer = Observer(_matrices(block, path) if names else {}, pairs=self._pairs)
            for batch, own in enumerate(self._calls):
                with observer:
                    given[batch] = (own[number].after(given[batch]) if number else own[number]).run(block)
            self._check_finite(path, block, given)
            del block
            told |= set(names)
            yield names, self._of_stored(names, observer.seen)
        if self._head is not None and self._head not in told:
            inputs = Inputs(pairs=self._pairs)
            for ids, last in zip(self._ids, given, strict=True):
                for hidden in self._model.head_inputs(ids, last):
                    inputs.add(hidden.flatten(0, -2))
            yield [self._head], {self._head: [(torch.arange(self._shapes[self._head][0]), inputs)]}

    def _of_stored(self, names: Collection[str], seen: Mapping[Rows, Inputs]) -> Seen:
        """What was seen of parameters, as inputs of stored tensors."""
        found: dict[str, Sequence[tuple[Tensor, Inputs]]] = {}
        for rule in {id(rule): rule for rule in (self._plan.by_source[name] for name in names)}.values():
            places = places_of(self._architecture, rule, self._shapes, self._roles)
            found |= {name: [pair for place in own for pair in _within(place, seen)] for name, own in places.items()}
        return found

    def _check_finite(self, path: str, block: nn.Module, given: list[Any]) -> None:
        hidden = (part[0] if isinstance(part, tuple) else part for part in given)
        if all(bool(part.isfinite().all()) for part in hidden):
            return
        model = self._model
        damaged = [name for name, tensor in block.named_parameters() if not bool(tensor.isfinite().all())]
        if damaged:
            raise CheckpointError(
                f"{model.weights.source}: {path}.{damaged[0]} has NaN or infinite values; repair the checkpoint"
            )
        raise IncompatibleError(
            f"calibration: {path} ({type(model.model).__name__}) gives NaN or infinite values on this text, computed "
            f"in {str(model.dtype).removeprefix('torch.')}, though its weights are finite; compress it without "
            "calibration (--calibration none)"
        )


def _matrices(block: nn.Module, path: str) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": parameter
        for name, parameter in block.named_parameters()
        if parameter.dim() > 1 and parameter.is_floating_point()
    }


def _within(place: MatrixPlace, seen: Mapping[Rows, Inputs]) -> Iterator[tuple[Tensor, Inputs]]:
    """The rows of a stored matrix that were seen."""
    left = place.rows >= 0
    for rows, inputs in seen.items():
        if rows.parameter == place.parameter and rows.transposed == place.transposed:
            mine = left & (place.rows >= rows.start) & (place.rows < rows.stop)
            if bool(mine.any()):
                left &= ~mine
                yield mine.nonzero().view(-1), inputs


def _batches(sequences: list[list[int]]) -> Iterator[list[list[int]]]:
    """Sequences of like lengths together, the shorter ones filled up with their own beginning.

    Padding instead would be routed by a mixture like any other token.
    """
    batch: list[list[int]] = []
    for tokens in sorted(sequences, key=len, reverse=True):
        if batch and (len(tokens) < FILLED * len(batch[0]) or len(batch[0]) * (len(batch) + 1) > TOKENS_AT_ONCE):
            yield batch
            batch = []
        length = len(batch[0]) if batch else len(tokens)
        batch.append((tokens * 2)[:length])
    yield batch

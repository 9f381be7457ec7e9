"""Where the rows of stored matrices lie in the parameters that they become.

A checkpoint's matrix is often a part of a parameter: an expert's matrix in a stack, q in a fused q, k and v. Which part
is found by trial: transformers' own conversion is given row numbers instead of weights, and column numbers after that.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.architecture import (
    LIE_TRANSPOSED,
    LINEAR,
    TRANSPOSED,
    Architecture,
    Conversion,
    as_matrix,
    from_matrix,
    matrix_shape,
)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
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
) -> dict[str, list[Place]]:
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
        return {name: [Place(target, roles[name] in LIE_TRANSPOSED, torch.arange(counts[name]))]}
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
    found: dict[str, list[Place]] = {}
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
                found.setdefault(name, []).append(Place(target, transposed, places))
    return found


def assembly(
    places: Mapping[str, list[Place]], target: str, shape: Shape
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

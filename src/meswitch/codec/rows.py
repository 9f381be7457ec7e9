"""Rows without a change take no bytes: an embedding's rows of tokens that the fine-tuning never saw.

In memory such a row has scale 0 and salient weights 0. Stored, it is left out, and `row_index` lists the others.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

BY_ROW = frozenset({"weight_packed", "weight_scale", "salient_weight", "weight_left"})  # parts that leave rows out


def without_negligible(delta: Tensor, floor: float) -> Tensor:
    """The delta with zeros in every row whose root mean square is below `floor` times that of the whole matrix.

    Weight decay and rounding move rows that no gradient ever reached. At a floor of 0.1 all that is dropped is less
    than a hundredth of the delta's energy, a tenth of what rounding to 2 bits loses.

    Args:
        delta: [rows, in_features] float32.
    """
    power = delta.double().square().mean(1)
    dropped = power < floor * floor * power.mean()
    return delta if not bool(dropped.any()) else delta.masked_fill(dropped[:, None], 0.0)


def live_rows(packed: Tensor, scale: Tensor, salient_weight: Tensor) -> Tensor | None:
    """[live] int32, ascending: the rows that change anything; None where leaving out the others saves nothing.

    Args:
        packed: [rows, words] int32. scale: [rows, groups]. salient_weight: [rows, k].
    """
    live = (scale != 0).any(1) | (salient_weight != 0).any(1)
    row_bytes = sum(part.shape[1] * part.element_size() for part in (packed, scale, salient_weight))
    count = int(live.sum())
    saved = (len(live) - count) * row_bytes
    return live.nonzero().squeeze(1).to(torch.int32) if saved > count * torch.int32.itemsize else None


def with_all_rows(parts: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Stored parts of a delta, by suffix, with the rows that were left out. rows: of the delta."""
    index = parts.get("row_index")
    if index is None:
        return dict(parts)
    return {suffix: expand_rows(part, index, rows) if suffix in BY_ROW else part for suffix, part in parts.items()}


def expand_rows(part: Tensor, index: Tensor, rows: int) -> Tensor:
    """[live, ...] -> [rows, ...] with zeros in the rows that are not stored."""
    whole = part.new_zeros(rows, *part.shape[1:])
    whole[index.long()] = part
    return whole

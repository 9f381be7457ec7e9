"""Per-axis weight deltas (arXiv 2512.19720): the sign of the delta times one scale a row or one a column.

As in the paper, every matrix takes the axis that reconstructs the layer's output better on calibration text. Ours: at
this stage the scales are not trained by gradient descent but solved: with the inputs' second moment `H` (the identity
without calibration) they minimise `tr((D - Dq) H (D - Dq)^T)`, one number a row, or a linear system over the columns.
The axis is chosen by the same error on the same text, not on held-out text, and the scales are bfloat16, not fp16. The
training of the scales end to end is `meswitch.compression.distill` with the authors' recipe (`RECIPE`).

Stored for [rows, in]: `sign_packed` int32 [rows, ceil(in / 32)], `axis_scale` bfloat16 [rows] or [in]: 1 + 16 / in or
1 + 16 / rows bits a weight.
"""

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from meswitch.codec import CodecRequest, Meta, Shapes, register
from meswitch.codec.feedback import damped
from meswitch.codec.quantize import SCALE_DTYPE, pack, packed_words, unpack
from meswitch_lab import bitdelta
from meswitch_lab.method import Encoded, Method, check
from meswitch_lab.signs import COLUMN, ROW, TrainableSigns

# Five epochs over 150 sequences at 1e-5 (the authors' README). Loss, length, cosine and one sequence a step are those
# of their code, which builds on BitDelta's.
RECIPE = dataclasses.replace(bitdelta.RECIPE, steps=750, learning_rate=1e-5, batch=1, check_every=50)


def encode(delta: Tensor, moment: Tensor | None, request: CodecRequest) -> Encoded:
    """delta: [rows, in] float32. moment: [in, in] float32 or None."""
    peak = delta.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    unit = delta / peak  # squares of small deltas must not vanish
    positive = delta >= 0
    signs = positive.float() * 2 - 1
    metric = None if moment is None else damped(moment, request.damping)
    row, column = _row_scales(unit, signs, metric), _column_scales(unit, signs, metric)
    row, column = (row * peak).to(SCALE_DTYPE), (column * peak).to(SCALE_DTYPE)
    by_row = _error(unit - signs * (row.float() / peak)[:, None], metric)
    by_column = _error(unit - signs * (column.float() / peak), metric)
    axis = ROW if by_row <= by_column else COLUMN
    parts = {"sign_packed": pack(positive.to(torch.uint8), 1), "axis_scale": row if axis == ROW else column}
    return parts, {"axis": axis}


def _row_scales(delta: Tensor, signs: Tensor, metric: Tensor | None) -> Tensor:
    """[rows]: `s H d / s H s` of each row."""
    moved = signs if metric is None else signs @ metric
    return (moved * delta).sum(1) / (moved * signs).sum(1).clamp_min(torch.finfo(torch.float32).tiny)


def _column_scales(delta: Tensor, signs: Tensor, metric: Tensor | None) -> Tensor:
    """[in]: the solution of `(S^T S o H) v = (S^T D o H) 1`."""
    if metric is None:
        return delta.abs().mean(0)
    normal = (signs.T @ signs * metric).double()
    right = (signs.T @ delta * metric).double().sum(1)
    return torch.linalg.solve(normal, right).float()


def _error(difference: Tensor, metric: Tensor | None) -> float:
    return float((difference * (difference if metric is None else difference @ metric)).sum())


def decode(parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
    """[rows, in] float32."""
    scale = parts["axis_scale"].float()
    return (unpack(parts["sign_packed"], 1, width).float() * 2 - 1) * (scale[:, None] if meta["axis"] == ROW else scale)


def shapes(rows: int, width: int, meta: Meta) -> Shapes:
    check(meta["axis"] in (ROW, COLUMN), f"axis: {meta['axis']} is neither {ROW} (rows) nor {COLUMN} (columns)")
    scale = ((rows if meta["axis"] == ROW else width,), SCALE_DTYPE)
    return {"sign_packed": ((rows, packed_words(width, 1)), torch.int32), "axis_scale": scale}


METHOD = register(
    Method(
        "per-axis",
        encode,
        decode,
        shapes,
        ("axis",),
        bits=1,
        blocks_only=True,
        uses_inputs=True,
        recipe=RECIPE,
        trains=functools.partial(TrainableSigns, "axis_scale"),
    )
)

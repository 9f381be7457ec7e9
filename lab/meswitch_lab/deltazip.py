"""DeltaZip (arXiv 2312.05215): two of every four weights are kept and rounded, with error feedback.

As SparseGPT (2301.00774), which it applies to the delta: walking along the inputs, in each four the two weights are
kept whose loss would cost the layer's output most (`(d / U_cc)^2`, U the Cholesky factor of the inputs' inverse second
moment `H^-1 = U^T U`), they are rounded, and what is lost is passed on to the inputs that follow. Without calibration
`H` is the identity: magnitudes decide and nothing is passed on. The authors take 4 or 2 bits and 256 sequences.

Ours: the levels are the codec's, the scales belong to groups (the authors' code has one a row) and are fixed beforehand
for the weights that the same score keeps before any correction. A layer's inputs are the uncompressed expert's; the
authors run each layer with the compressed delta before they look at the next. There is no lossless compression of the
codes on top. The default is 2 bits as everywhere here.

Stored for [rows, in] with q = ceil(in / 4): `kept_packed` int32 [rows, ceil(2 q bits / 32)], `index_packed` int32
[rows, ceil(2 q * 2 / 32)] (position in its four, ascending), `kept_scale` bfloat16 [rows, ceil(2 q / group)]:
(bits + 2 + 16 / group) / 2 bits a weight.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from meswitch.codec import CodecRequest, Meta, Shapes, register
from meswitch.codec.feedback import damped, inverse_factor
from meswitch.codec.quantize import mse_scales, pack, packed_words, unpack
from meswitch_lab.method import (
    Encoded,
    Method,
    bits_of,
    check,
    group_meta,
    group_of,
    restore_matrix,
    rounded_shapes,
)

_BLOCK = 128  # inputs between two corrections of all that follow; a multiple of 4


def encode(delta: Tensor, moment: Tensor | None, request: CodecRequest) -> Encoded:
    """delta: [rows, in] float32. moment: [in, in] float32 or None."""
    bits, group_size = request.bits, request.group_size
    rows, width = delta.shape
    quads = math.ceil(width / 4)
    target = F.pad(delta, (0, 4 * quads - width)).clone()
    factor = _factor(moment, 4 * quads, request.damping, delta)
    weight = factor.diagonal()
    magnitudes = target.view(rows, quads, 4)
    first = _two_of_four(magnitudes / weight.view(quads, 4))
    scale = mse_scales(magnitudes.gather(2, first).view(rows, -1), bits, group_size)
    top = 2**bits - 1
    codes, kept = torch.empty_like(first, dtype=torch.uint8), torch.empty_like(first)
    for start in range(0, 4 * quads, _BLOCK):
        stop = min(start + _BLOCK, 4 * quads)
        errors = torch.empty(rows, stop - start, dtype=torch.float32, device=delta.device)
        for quad in range(start // 4, stop // 4):
            columns = slice(4 * quad, 4 * quad + 4)
            kept[:, quad] = _two_of_four(target[:, columns] / weight[columns])
            mask = torch.zeros(rows, 4, dtype=torch.bool, device=delta.device).scatter_(1, kept[:, quad], True)
            step = scale[:, 0 if group_size is None else 2 * quad // group_size].float()
            mask &= (step > 0)[:, None]
            found = torch.empty(rows, 4, dtype=torch.uint8, device=delta.device)
            for i in range(4):
                column = 4 * quad + i
                value = target[:, column]
                code = ((value / step.clamp_min(torch.finfo(torch.float32).tiny) + top) / 2).round_().clamp_(0, top)
                restored = torch.where(mask[:, i], (code * 2 - top) * step, 0.0)
                error = (value - restored) / factor[column, column]
                target[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
                errors[:, column - start] = error
                found[:, i] = code.to(torch.uint8)
            codes[:, quad] = found.gather(1, kept[:, quad])
        target[:, stop:] -= errors @ factor[start:stop, stop:]
    parts = {
        "kept_packed": pack(codes.view(rows, -1), bits),
        "kept_scale": scale,
        "index_packed": pack(kept.view(rows, -1), 2),
    }
    return parts, {"bits": bits, "group_size": group_meta(group_size)}


def _factor(moment: Tensor | None, width: int, damping: float, like: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse second moment, [width, width]; inputs that pad the last four are idle."""
    if moment is None:
        return torch.eye(width, dtype=torch.float32, device=like.device)
    missing = width - len(moment)
    metric = F.pad(damped(moment, damping), (0, missing, 0, missing))
    metric.diagonal()[len(moment) :] = moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return inverse_factor(metric, torch.arange(width, device=like.device))


def _two_of_four(score: Tensor) -> Tensor:
    """[..., 4] -> [..., 2] int64: positions of the two largest magnitudes, ascending."""
    return score.abs().topk(2, dim=-1).indices.sort(dim=-1).values


def decode(parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
    """[rows, in] float32."""
    quads = math.ceil(width / 4)
    values = restore_matrix(parts, 2 * quads, bits_of(meta), group_of(meta), "kept").view(rows, quads, 2)
    positions = unpack(parts["index_packed"], 2, 2 * quads).long().view(rows, quads, 2)
    return torch.zeros(rows, quads, 4, device=values.device).scatter_(2, positions, values).view(rows, -1)[:, :width]


def shapes(rows: int, width: int, meta: Meta) -> Shapes:
    kept, group_size = 2 * math.ceil(width / 4), group_of(meta)
    check(
        group_size is None or group_size % 2 == 0, f"group_size: {group_size} is odd; two weights of four share a scale"
    )
    index = {"index_packed": ((rows, packed_words(kept, 2)), torch.int32)}
    return rounded_shapes(rows, kept, bits_of(meta), group_size, "kept") | index


def _check(request: CodecRequest) -> None:
    check(
        (request.group_size or 0) % 2 == 0,
        f"group_size: {request.group_size}: two weights of four share a scale: give an even number",
    )


METHOD = register(
    Method(
        "deltazip",
        encode,
        decode,
        shapes,
        ("bits", "group_size"),
        blocks_only=True,
        uses_inputs=True,
        check=_check,
    )
)

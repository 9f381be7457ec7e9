"""Delta-CoMe (arXiv 2406.08903): singular vectors in mixed precision, more bits for larger singular values.

The delta's leading singular vectors are stored in 8 bit, the next in 3, more in 2, the rest is dropped; all are rounded
in groups, with error feedback (GPTQ) where the inputs' second moment is known. At a width of 4096 the authors' code
takes 2 vectors in 8 bit, 32 in 3 bit and 968 (attention) or 1428 (MLP) in 2 bit, groups of 128.

Ours: the first two counts scale with the width (at least 1 each), and the 2-bit vectors fill the bytes that the default
method spends on the same matrix, unless there are fewer (the paper's own budget is 1/16 of 16 bits a weight). Each
vector of either side has its own scales, along its length, and carries the square root of its singular value, which the
authors keep apart. `V^T` is rounded for the inputs' second moment, `U` for that of `V^T x` with the rounded `V^T`,
within each band of equal bits. The inputs are the uncompressed expert's, where the authors' have passed the layers
compressed so far. The levels are the codec's.

Stored for [rows, in] and each band of n vectors in b bits: `right<b>_packed` [n, ceil(in b / 32)] int32 (8 bit: uint8
[n, in]), `right<b>_scale` bfloat16 [n, ceil(in / group)], and `left<b>_*` alike with rows for in. Bits a weight: the
sum of n (b + 16 / group) (rows + in) / (rows in).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from meswitch.codec import BPW, CodecRequest, Meta, Shapes, nbytes, register
from meswitch.codec.feedback import damped, feedback_codes, upper_factor
from meswitch.codec.quantize import expand_scale, pack
from meswitch_lab.method import (
    Encoded,
    Method,
    check,
    group_meta,
    group_of,
    restore_matrix,
    round_matrix,
    rounded_shapes,
)
from meswitch_lab.svd import decompose

BITS = (8, 3, 2)
WIDTH, COUNTS = 4096, (2, 32)  # vectors of the two upper bands at this width


def encode(delta: Tensor, moment: Tensor | None, request: CodecRequest) -> Encoded:
    """delta: [rows, in] float32. moment: [in, in] float32 or None."""
    rows, width = delta.shape
    meta = _bands(rows, width, request)
    left, values, right = decompose(delta)
    root = values.sqrt()
    left, right = (left * root).T.contiguous(), root[:, None] * right  # both [vectors, length]
    parts: dict[str, Tensor] = {}
    start = 0
    for bits in BITS:
        band = slice(start, start + meta[f"vectors_{bits}"])
        start = band.stop
        if band.start == band.stop:
            continue
        parts |= round_matrix(right[band], bits, request.group_size, f"right{bits}", moment, request.damping)
        lefts = round_matrix(left[band], bits, request.group_size, f"left{bits}")
        if moment is not None:
            inputs = restore_matrix(parts, width, bits, request.group_size, f"right{bits}")
            seen = damped(inputs @ moment @ inputs.T, request.damping)
            lefts = _feedback(left[band], bits, request.group_size, f"left{bits}", lefts, seen)
        parts |= lefts
    return parts, meta


def _feedback(
    vectors: Tensor, bits: int, group_size: int | None, prefix: str, rounded: dict[str, Tensor], metric: Tensor
) -> dict[str, Tensor]:
    """Codes of [n, rows] vectors with error feedback over the n inputs they are applied to; scales as they are."""
    scale = expand_scale(rounded[f"{prefix}_scale"].float(), vectors.shape[1], group_size)
    order = metric.diagonal().argsort(descending=True, stable=True)
    codes = feedback_codes(vectors.T, scale.T, bits, 1, upper_factor(metric, order), order, exact=0).T.contiguous()
    return rounded | {f"{prefix}_packed": codes if bits == 8 else pack(codes, bits)}


def _bands(rows: int, width: int, request: CodecRequest) -> dict[str, int]:
    """How many vectors are stored in how many bits."""
    full = min(rows, width)
    meta = {"vectors_8": 0, "vectors_3": 0, "vectors_2": 0, "group_size": group_meta(request.group_size)}
    used = 0
    for bits, count in zip(BITS, (*COUNTS, None), strict=True):
        wanted = full if count is None else max(1, round(count * full / WIDTH))
        each = nbytes(_band_shapes(rows, width, bits, 1, request.group_size))
        fitting = max(request.budget - used, 0) // each
        if bits == BITS[0]:
            fitting = max(1, fitting)
        meta[f"vectors_{bits}"] = min(wanted, fitting, full - sum(meta[f"vectors_{b}"] for b in BITS))
        used += each * meta[f"vectors_{bits}"]
    return meta


def _band_shapes(rows: int, width: int, bits: int, vectors: int, group_size: int | None) -> Shapes:
    right = rounded_shapes(vectors, width, bits, group_size, f"right{bits}")
    return right | rounded_shapes(vectors, rows, bits, group_size, f"left{bits}")


def decode(parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
    """[rows, in] float32."""
    group_size = group_of(meta)
    stored = [bits for bits in BITS if meta[f"vectors_{bits}"]]
    left = torch.cat([restore_matrix(parts, rows, bits, group_size, f"left{bits}") for bits in stored])
    right = torch.cat([restore_matrix(parts, width, bits, group_size, f"right{bits}") for bits in stored])
    return left.T @ right


def shapes(rows: int, width: int, meta: Meta) -> Shapes:
    counts = {bits: meta[f"vectors_{bits}"] for bits in BITS}
    check(min(counts.values()) >= 0, "vectors: a negative number of them")
    check(1 <= sum(counts.values()) <= min(rows, width), f"vectors: not within 1 and {min(rows, width)}")
    found: Shapes = {}
    for bits, count in counts.items():
        found |= _band_shapes(rows, width, bits, count, group_of(meta)) if count else {}
    return found


METHOD = register(
    Method(
        "delta-come",
        encode,
        decode,
        shapes,
        ("vectors_8", "vectors_3", "vectors_2", "group_size"),
        (BPW,),
        blocks_only=True,
        uses_inputs=True,
    )
)

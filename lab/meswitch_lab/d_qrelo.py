"""D-QReLO (arXiv 2604.16940, section 4): a sign a weight, and a low-rank approximation of what the signs miss.

First `alpha sign(D)` with `alpha = mean |D|`, the least-squares scalar for given signs, as BitDelta does; then the best
approximation of rank r of the residual `R = D - alpha sign(D)` (truncated SVD). The paper's order: signs before the low
rank, because the residual has a smaller range than the delta. No training, no data. The paper compresses at 1/8 and
sets `r = n m rho / (n + m)` from the share `rho` of the size that is left for the factors.

Ours: the rank is the largest whose factors fit in what the signs leave of the budget, 0 where nothing is left; both
factors are bfloat16 and carry the square root of the singular values; a weight without change counts as +1. Norms and
biases stay exact, where the paper prunes them by magnitude. A sign a weight is the least: less than 1 bit a weight is
refused.

Stored for [rows, in]: `sign_packed` int32 [rows, ceil(in / 32)], `sign_scale` float32 [1], and for r > 0 `factor_left`
bfloat16 [rows, r], `factor_right` bfloat16 [r, in]: 1 + 16 r (rows + in) / (rows in) bits a weight + 4 bytes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from meswitch.codec import BPW, CodecRequest, Meta, Shapes, nbytes, register
from meswitch_lab import bitdelta
from meswitch_lab.method import Encoded, Method, check
from meswitch_lab.svd import decompose

_DTYPE = torch.bfloat16


def encode(delta: Tensor, moment: Tensor | None, request: CodecRequest) -> Encoded:
    """delta: [rows, in] float32; `moment` is not used."""
    rows, width = delta.shape
    parts, _ = bitdelta.encode(delta, None, request)
    left_over = request.budget - nbytes(bitdelta.shapes(rows, width, {}))
    rank = max(0, min(left_over // (_DTYPE.itemsize * (rows + width)), rows, width))
    if rank:
        left, values, right = decompose(delta - bitdelta.decode(parts, rows, width, {}))
        root = values[:rank].sqrt()
        parts["factor_left"] = (left[:, :rank] * root).to(_DTYPE)
        parts["factor_right"] = (root[:, None] * right[:rank]).to(_DTYPE)
    return parts, {"rank": rank}


def decode(parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
    """[rows, in] float32."""
    delta = bitdelta.decode(parts, rows, width, {})
    return delta + parts["factor_left"].float() @ parts["factor_right"].float() if meta["rank"] else delta


def shapes(rows: int, width: int, meta: Meta) -> Shapes:
    rank = meta["rank"]
    check(0 <= rank <= min(rows, width), f"rank: {rank} is not within 0 and {min(rows, width)}")
    found = bitdelta.shapes(rows, width, {})
    if rank:
        found |= {"factor_left": ((rows, rank), _DTYPE), "factor_right": ((rank, width), _DTYPE)}
    return found


def _check(request: CodecRequest) -> None:
    wanted = request.parameters.get(BPW.name, 1.0)
    check(wanted >= 1, f"bpw: {wanted:g}: the method stores a sign a weight: at least 1")


METHOD = register(Method("d-qrelo", encode, decode, shapes, ("rank",), (BPW,), check=_check))

"""Low rank: the best approximation of the delta of rank r (truncated SVD), the baseline of 2402.10193 and 2406.08903.

`D ~ L R` with `L = U sqrt(S)`, `R = sqrt(S) V^T`, both bfloat16. Ours: the rank. Unless it is given, it is the largest
whose factors fit in the bytes that the default method spends on the same matrix at the same bits (at least 1).

Stored for [rows, in]: `factor_left` bfloat16 [rows, r], `factor_right` bfloat16 [r, in]: 16 r (rows + in) / (rows in)
bits a weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from meswitch.codec import BPW, CodecRequest, Meta, Parameter, Shapes, register
from meswitch_lab.method import Encoded, Method, check

RANK = Parameter("rank", "Of the factors, instead of a budget.", least=1, whole=True)

_DTYPE = torch.bfloat16  # products of deltas' square roots: the range matters more than the last bits


def encode(delta: Tensor, moment: Tensor | None, request: CodecRequest) -> Encoded:
    """delta: [rows, in] float32; `moment` is not used."""
    rows, width = delta.shape
    asked = int(request.parameters.get("rank", request.budget // (_DTYPE.itemsize * (rows + width))))
    rank = min(max(1, asked), rows, width)
    left, values, right = decompose(delta)
    root = values[:rank].sqrt()
    parts = {"factor_left": left[:, :rank] * root, "factor_right": root[:, None] * right[:rank]}
    return {name: part.to(_DTYPE) for name, part in parts.items()}, {"rank": rank}


def decompose(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [rows, m], S [m], V^T [m, in] float32 with m = min(rows, in); the arithmetic is float64 for small deltas."""
    peak = delta.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    left, values, right = torch.linalg.svd((delta / peak).double(), full_matrices=False)
    return left.float(), (values * peak).float(), right.float()


def decode(parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
    """[rows, in] float32."""
    return parts["factor_left"].float() @ parts["factor_right"].float()


def shapes(rows: int, width: int, meta: Meta) -> Shapes:
    rank = meta["rank"]
    check(1 <= rank <= min(rows, width), f"rank: {rank} is not within 1 and {min(rows, width)}")
    return {"factor_left": ((rows, rank), _DTYPE), "factor_right": ((rank, width), _DTYPE)}


METHOD = register(Method("svd", encode, decode, shapes, ("rank",), (BPW, RANK)))

"""DARE (arXiv 2311.03099): drop a random share p of the delta and rescale the rest by 1 / (1 - p).

The paper drops 90 % or even 99 %. It makes models to be merged, not small files: what is kept stays in 16 bit. Ours: it
is rounded to nearest in groups of kept weights, with scales of least squared error. Every row keeps the same number of
weights, where the authors draw each weight by itself, so that shapes are known beforehand, and the rescaling uses the
exact share kept. The mask is paid for as a bit a weight, although the seed (kept
in the manifest, another one for every tensor) could draw it again on the same version of torch.

Stored for [rows, in] with k = max(1, round((1 - p) in)): `mask_packed` int32 [rows, ceil(in / 32)], `kept_packed` int32
[rows, ceil(k bits / 32)], `kept_scale` bfloat16 [rows, ceil(k / group)]: 1 + (1 - p) (bits + 16 / group) bits a weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from meswitch.codec import CodecRequest, Meta, Parameter, Shapes, register
from meswitch.codec.quantize import pack, packed_words, unpack
from meswitch_lab.method import (
    Encoded,
    Method,
    bits_of,
    check,
    group_meta,
    group_of,
    restore_matrix,
    round_matrix,
    rounded_shapes,
)

DROP = Parameter("drop", "Share of weights that is set to zero.", default=0.9, below=1)
SEED = Parameter("seed", "Of the choice of weights.", default=0, whole=True)


def encode(delta: Tensor, moment: Tensor | None, request: CodecRequest) -> Encoded:
    """delta: [rows, in] float32; `moment` is not used."""
    rows, width = delta.shape
    keep = max(1, round((1 - request.parameters.get("drop", DROP.default or 0.0)) * width))
    generator = torch.Generator().manual_seed(request.seed)
    chosen = torch.rand(rows, width, generator=generator).topk(keep, dim=1).indices.sort(dim=1).values.to(delta.device)
    mask = torch.zeros(rows, width, dtype=torch.uint8, device=delta.device).scatter_(1, chosen, 1)
    rest = delta.gather(1, chosen) * (width / keep)
    parts = {"mask_packed": pack(mask, 1)} | round_matrix(rest, request.bits, request.group_size, "kept")
    return parts, {
        "bits": request.bits, "group_size": group_meta(request.group_size), "keep": keep, "seed": request.seed,
    }  # fmt: skip


def decode(parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
    """[rows, in] float32."""
    values = restore_matrix(parts, meta["keep"], bits_of(meta), group_of(meta), "kept")
    mask = unpack(parts["mask_packed"], 1, width).bool()
    delta = torch.zeros(rows, width, dtype=torch.float32, device=values.device)
    return delta.masked_scatter_(mask, values)


def shapes(rows: int, width: int, meta: Meta) -> Shapes:
    check(1 <= meta["keep"] <= width, f"keep: {meta['keep']} is not within 1 and {width}")
    mask = {"mask_packed": ((rows, packed_words(width, 1)), torch.int32)}
    return mask | rounded_shapes(rows, meta["keep"], bits_of(meta), group_of(meta), "kept")


METHOD = register(Method("dare", encode, decode, shapes, ("bits", "group_size", "keep", "seed"), (DROP, SEED)))

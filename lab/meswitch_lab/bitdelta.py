"""BitDelta (arXiv 2402.10193, section 3.1): the sign of the delta times one scalar a matrix.

The scalar is the mean magnitude, which is the least-squares one for given signs. Only the projections of the blocks are
compressed; embedding, head and norms stay whole (ours: `embeddings="quantised"` compresses embedding and head by the
same rule). A weight without change counts as +1, as in the authors' code. This is the paper's "BitDelta-Initial"; its
second step, training the scalars against the full expert, is `meswitch.compression.distill` with the paper's recipe
(`RECIPE`). A matrix without any change has scalar 0 and stays exact.

Stored for [rows, in]: `sign_packed` int32 [rows, ceil(in / 32)], `sign_scale` float32 [1]: 1 bit a weight + 4 bytes.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from meswitch.codec import CodecRequest, Meta, Shapes, register
from meswitch.codec.quantize import pack, packed_words, unpack
from meswitch.compression.options import TrainingRecipe
from meswitch_lab.method import Encoded, Method
from meswitch_lab.signs import TrainableSigns

# Sections 3.1 and 3.2: scalars only, mean squared error of the logits on 800 sequences of 128 tokens, 4 a step, Adam.
# The cosine is the authors' code's, which hands embedding, head and norms to AdamW as well.
RECIPE = TrainingRecipe(
    steps=200,
    learning_rate=1e-4,
    relative=False,
    betas=(0.9, 0.999),
    batch=4,
    loss="mse",
    hidden=0.0,
    question_weight=1.0,
    length=128,
    norms=False,
    codes=False,
)


def encode(delta: Tensor, moment: Tensor | None, request: CodecRequest) -> Encoded:
    """delta: [rows, in] float32; `moment` and the request are not used."""
    scale = delta.abs().double().mean().float().reshape(1)
    return {"sign_packed": pack((delta >= 0).to(torch.uint8), 1), "sign_scale": scale}, {}


def decode(parts: Mapping[str, Tensor], rows: int, width: int, meta: Meta) -> Tensor:
    """[rows, in] float32."""
    return (unpack(parts["sign_packed"], 1, width).float() * 2 - 1) * parts["sign_scale"]


def shapes(rows: int, width: int, meta: Meta) -> Shapes:
    return {"sign_packed": ((rows, packed_words(width, 1)), torch.int32), "sign_scale": ((1,), torch.float32)}


METHOD = register(
    Method(
        "bitdelta",
        encode,
        decode,
        shapes,
        bits=1,
        blocks_only=True,
        recipe=RECIPE,
        trains=functools.partial(TrainableSigns, "sign_scale"),
    )
)

"""Codes of 1-4 bits packed into int32 words along the input dimension.

The words of a row are one little-endian bit stream: code `i` occupies bits `[i * bits, (i + 1) * bits)`.
For 1, 2 and 4 bits that is the order of compressed-tensors' `weight_packed`; 3 bits are packed densely
(32 codes in 3 words) where compressed-tensors spends 3.2 bits on each.
"""

import math

import torch
from torch import Tensor

WORD = 32


def packed_words(in_features: int, bits: int) -> int:
    """Number of int32 words in one packed row."""
    return math.ceil(in_features * bits / WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        codes: [rows, in_features] any integer dtype, values in [0, 2**bits).
        bits: 1, 2, 3 or 4.

    Returns:
        [rows, ceil(in_features * bits / 32)] int32.
    """
    rows, width = codes.shape
    period = math.lcm(bits, WORD) // bits  # codes after which the pattern of bit offsets repeats
    words_per_period = period * bits // WORD
    padded = torch.zeros(rows, math.ceil(width / period) * period, dtype=torch.int64, device=codes.device)
    padded[:, :width] = codes
    padded = padded.view(rows, -1, period)
    words = torch.zeros(rows, padded.shape[1], words_per_period, dtype=torch.int64, device=codes.device)
    for i in range(period):
        word, offset = divmod(i * bits, WORD)
        words[:, :, word] |= (padded[:, :, i] << offset) & 0xFFFFFFFF
        if offset + bits > WORD:
            words[:, :, word + 1] |= padded[:, :, i] >> (WORD - offset)
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.view(rows, -1)[:, : packed_words(width, bits)].contiguous()


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: [rows, words] int32.
        bits: 1, 2, 3 or 4.
        in_features: codes in a row; the padding after them is dropped.

    Returns:
        [rows, in_features] uint8.
    """
    period = math.lcm(bits, WORD) // bits
    words_per_period = period * bits // WORD
    rows, width = packed.shape
    padded = torch.zeros(
        rows, math.ceil(width / words_per_period) * words_per_period, dtype=torch.int64, device=packed.device
    )
    padded[:, :width] = packed.to(torch.int64) & 0xFFFFFFFF
    padded = padded.view(rows, -1, words_per_period)
    mask = 2**bits - 1
    columns = []
    for i in range(period):
        word, offset = divmod(i * bits, WORD)
        value = padded[:, :, word] >> offset
        if offset + bits > WORD:
            value = value | (padded[:, :, word + 1] << (WORD - offset))
        columns.append((value & mask).to(torch.uint8))
    return torch.stack(columns, dim=-1).view(rows, -1)[:, :in_features].contiguous()

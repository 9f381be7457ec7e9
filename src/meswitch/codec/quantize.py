"""Mid-rise uniform quantisation of a delta in groups of input channels, and its codes packed into int32 words.

A code `c` in [0, 2**bits) stands for the odd integer `2 c - (2**bits - 1)`, times the group's scale:
one bit gives {-s, +s} (BitDelta's sign), two bits {-3s, -s, +s, +3s}. The levels are symmetric and have
no zero, which is what minimises the error of a bell-shaped delta at one and two bits; a group whose
values are all zero gets scale 0 and stays exactly zero.

The packed words of a row are one little-endian bit stream: code `i` occupies bits `[i * bits, (i + 1) * bits)`.
For 1, 2 and 4 bits that is the order of compressed-tensors' `weight_packed`; 3 bits are packed densely
(32 codes in 3 words) where compressed-tensors spends 3.2 bits on each.
"""

import math

import torch
from torch import Tensor

SCALES = ("mse", "absmax", "normal")
SCALE_DTYPE = torch.bfloat16  # deltas of fine-tunes reach 1e-7: below the normal range of fp16

# Step / (2 * standard deviation) that minimises the squared error of a normal variable (Max, 1960).
_NORMAL_STEP = {1: 0.7979, 2: 0.4978, 3: 0.2930, 4: 0.1676}
_MULTIPLES = (0.6, 0.8, 1.0, 1.25)
_REFINEMENTS = 2
_TINY = torch.finfo(torch.float32).tiny
WORD = 32


def group_count(in_features: int, group_size: int | None) -> int:
    """Scales in one row; `None` is one scale a row."""
    return 1 if group_size is None else math.ceil(in_features / group_size)


def expand_scale(scale: Tensor, in_features: int, group_size: int | None) -> Tensor:
    """[rows, groups] -> [rows, in_features], each scale repeated over its group."""
    if group_size is None:
        return scale.expand(-1, in_features)
    return scale.repeat_interleave(group_size, dim=1)[:, :in_features]


def levels(codes: Tensor, bits: int) -> Tensor:
    """Codes as odd integers in float32, same shape."""
    return codes.to(torch.float32) * 2 - (2**bits - 1)


def quantize(delta: Tensor, scale: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Nearest codes for given scales.

    Args:
        delta: [rows, in_features] float32.
        scale: [rows, groups] any float dtype, >= 0.

    Returns:
        [rows, in_features] uint8. With level step `2 s` the error is at most `s` inside the range and
        `|d| - (2**bits - 1) s` outside.
    """
    step = expand_scale(scale.to(torch.float32), delta.shape[1], group_size)
    top = 2**bits - 1
    codes = (delta / step.clamp_min(_TINY) + top) / 2
    return codes.round_().clamp_(0, top).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, bits: int, group_size: int | None) -> Tensor:
    """[rows, in_features] codes and [rows, groups] scales -> [rows, in_features] float32."""
    return levels(codes, bits) * expand_scale(scale.to(torch.float32), codes.shape[1], group_size)


def absmax_scales(delta: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Scales whose outermost level is the group's largest magnitude: [rows, groups] bfloat16."""
    grouped, _ = _grouped(delta, group_size)
    return (grouped.abs().amax(dim=-1) / (2**bits - 1)).to(SCALE_DTYPE)


def normal_scales(delta: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Scales that would be optimal for normally distributed groups: [rows, groups] bfloat16; one pass."""
    grouped, mask = _grouped(delta, group_size)
    size = grouped.shape[-1] if mask is None else mask.sum(dim=-1)
    mean = grouped.abs().sum(dim=-1) / size  # sqrt(2 / pi) standard deviations; squares could overflow
    return (mean / math.sqrt(2 / math.pi) * _NORMAL_STEP[bits]).to(SCALE_DTYPE)


def mse_scales(delta: Tensor, bits: int, group_size: int | None, weight: Tensor | None = None) -> Tensor:
    """Scales that minimise the (weighted) squared error of each group.

    A search over multiples of the normal distribution's optimum and of the absolute maximum finds the
    basin; alternating least squares (codes for the scale, then the scale for the codes) ends in its
    minimum.

    Args:
        delta: [rows, in_features] float32.
        weight: [in_features] float32 >= 0, the importance of each input channel; None weighs all alike.

    Returns:
        [rows, groups] bfloat16.
    """
    grouped, mask = _grouped(delta, group_size)
    if weight is not None:
        mask = _grouped(weight[None], group_size)[0]  # padding weighs nothing either
    top = 2**bits - 1
    peak = grouped.abs().amax(dim=-1, keepdim=True)
    unit = grouped / peak.clamp_min(_TINY)  # squares of huge deltas must not overflow
    if mask is None:
        power = unit.square().mean(dim=-1, keepdim=True)
    else:
        count = mask.sum(dim=-1, keepdim=True).clamp_min(_TINY)
        power = (unit.square() * mask).sum(dim=-1, keepdim=True) / count
    rms = power.sqrt()
    best, best_error = torch.zeros_like(rms), torch.full_like(rms, math.inf)
    codes = torch.empty_like(unit)

    def consider(scale: Tensor) -> Tensor:
        """Keep `scale` where it is the best so far; return the least-squares scale for its codes."""
        nonlocal best, best_error
        torch.div(unit, (2 * scale).clamp_min(_TINY), out=codes)
        codes.add_(top / 2).round_().clamp_(0, top).mul_(2).sub_(top)
        weighted = codes if mask is None else codes * mask
        cross = (unit * weighted).sum(dim=-1, keepdim=True)
        norm = (codes * weighted).sum(dim=-1, keepdim=True)
        error = scale * (scale * norm - 2 * cross)  # less the constant power of the delta
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
        return (cross / norm.clamp_min(_TINY)).clamp_min(0)

    for multiple in _MULTIPLES:
        consider(rms * (_NORMAL_STEP[bits] * multiple))
    refined = consider(peak / peak.clamp_min(_TINY) / top)
    consider(refined)
    for _ in range(_REFINEMENTS):
        refined = consider(consider(best))
    return (best * peak).squeeze(-1).to(SCALE_DTYPE)


def starting_scales(
    search: str, delta: Tensor, bits: int, group_size: int | None, weight: Tensor | None = None
) -> Tensor:
    """[rows, groups] bfloat16 by one of `SCALES`; `weight` is used by `mse` only."""
    if search == "mse":
        return mse_scales(delta, bits, group_size, weight)
    return (absmax_scales if search == "absmax" else normal_scales)(delta, bits, group_size)


def _grouped(delta: Tensor, group_size: int | None) -> tuple[Tensor, Tensor | None]:
    """[rows, in] -> [rows, groups, size] zero-padded; and a [groups, size] mask of what is not padding, if any is."""
    rows, width = delta.shape
    size = width if group_size is None else group_size
    groups = group_count(width, group_size)
    missing = groups * size - width
    if not missing:
        return delta.view(rows, groups, size), None
    mask = torch.ones(width, dtype=torch.float32, device=delta.device)
    mask = torch.nn.functional.pad(mask, (0, missing)).view(groups, size)
    return torch.nn.functional.pad(delta, (0, missing)).view(rows, groups, size), mask


def packed_words(in_features: int, bits: int) -> int:
    """Number of int32 words in one packed row."""
    return math.ceil(in_features * bits / WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        codes: [rows, in_features] any integer dtype, values in [0, 2**bits).
        bits: 1 to 8.

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

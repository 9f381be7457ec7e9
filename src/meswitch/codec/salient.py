"""Which input channels of a delta stay in 16 bit."""

import torch
from torch import Tensor

# `error` is the method's; the others are there to compare with
RULES = ("error", "magnitude", "activation", "random")


def reconstruction_error(delta: Tensor, dequantized: Tensor, energy: Tensor | None) -> Tensor:
    """What quantising each input channel costs the layer's output.

    ME-Switch, section 3 (arXiv 2406.09041): `E_i = sum_j ||x_i D_ij - x_i Dq_ij||^2` over calibration inputs,
    which is `||X_:,i||^2 * ||D_:,i - Dq_:,i||^2`.

    Args:
        delta, dequantized: [out_features, in_features] float32.
        energy: [in_features] float32, `||X_:,i||^2` up to a common factor; None is the data-free form,
            in which every channel carries the same energy.

    Returns:
        [in_features] float32.
    """
    error = (delta - dequantized).square().sum(dim=0)
    return error if energy is None else error * energy


def select_salient(score: Tensor, count: int) -> Tensor:
    """The `count` channels of largest score, ascending: [min(count, in_features)] int32."""
    count = min(count, score.numel())
    return torch.topk(score, count).indices.sort().values.to(torch.int32)


def other_score(rule: str, delta: Tensor, energy: Tensor | None) -> Tensor:
    """Scores of input channels by a rule that does not look at the rounding error: [in_features] float32.

    `magnitude`: the delta's own energy. `activation`: the inputs' (all alike without calibration). `random`: a fixed
    permutation.
    """
    width = delta.shape[1]
    if rule == "magnitude":
        return delta.square().sum(dim=0)
    if rule == "activation":
        return delta.new_ones(width) if energy is None else energy
    return torch.randperm(width, generator=torch.Generator().manual_seed(width)).to(delta)

"""Launching the decode kernel: its tiles by shape and bucket, its scratch memory."""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meswitch.ops.triton_decode import decode_kernel

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # no inline assembly there
_PROGRAMS = 132 * 6  # enough for every multiprocessor of an H100 to have its share of loads in flight
_LEAST_CHANNELS = 1024  # of one program: less does not pay for its start


@dataclass(frozen=True, slots=True)
class Config:
    """rows, tokens: of a tile. split: programs that share a tile's input channels. warps, stages: Triton's.

    early: start while the kernel before this one ends (programmatic dependent launch). Right only if that kernel wrote
    y and not x, as the base's product does.
    """

    rows: int
    tokens: int
    split: int
    warps: int = 2
    stages: int = 3
    early: bool = False


def choose(rows: int, in_features: int, experts: int, tokens: int) -> Config:
    """Tiles from the layer's shape and the step's buckets, and from nothing else."""
    tile, warps, stages = {8: (128, 2, 3), 16: (128, 2, 3), 32: (64, 2, 3)}.get(tokens, (128, 4, 2))
    programs = math.ceil(rows / tile) * experts
    split = 1
    while programs * split * 2 <= _PROGRAMS and in_features // (split * 2) >= _LEAST_CHANNELS:
        split *= 2
    return Config(tile, tokens, split, warps, stages)


def constants(
    config: Config, rows: int, in_features: int, two: bool, one: bool, group: int, salient: int
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "TWO": two,
        "ONE": one,
        "SALIENT": salient,
        "GROUP": group,
        "EVEN_K": in_features % 512 == 0,
        "EVEN_N": rows % config.rows == 0,
        "INTERPRET": INTERPRET,
        "PDL": config.early,
        "BN": config.rows,
        "MT": config.tokens,
        "SPLIT": config.split,
        "STAGES": config.stages,
        "num_warps": config.warps,
        **({"launch_pdl": True} if config.early else {}),
    }


def decode(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    arrived: Tensor,
    slots: Tensor,
    starts: Tensor,
    order: Tensor,
    max_tokens: int,
    two: bool,
    one: bool,
    group: int,
    salient: int,
    config: Config | None = None,
) -> None:
    """`y += x D^T` in one launch; see `linear.expert_linear` for the shapes."""
    rows, width, experts = y.shape[1], x.shape[1], slots.numel()
    config = config or choose(rows, width, experts, max_tokens)
    tiles = math.ceil(rows / config.rows)
    if config.split > 1:
        size = tiles * experts * config.split * config.rows * config.tokens
        work = torch.empty(size, dtype=torch.float32, device=x.device)
    else:
        work = starts  # not used
    strides = x.stride(0), y.stride(0)
    decode_kernel[(tiles, config.split, experts)](
        *(x, y, arena.view(torch.int32), table, slots, starts, order, work, arrived, *strides, rows, width),
        **constants(config, rows, width, two, one, group, salient),
    )

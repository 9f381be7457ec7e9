"""The GPU kernels, each with its launcher.

A kernel's module is imported where it is launched, and nowhere else: a CPU may have no Triton. This one and `ahead`
need none.
"""

import functools
import importlib.util
import os

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # no inline assembly there


@functools.cache
def on_hopper(device: torch.device) -> bool:
    """Whether kernels for `wgmma` run there: a GPU of compute capability 9, and a Triton that has its language."""
    there = device.type == "cuda" and torch.cuda.is_available()
    if not there or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return not INTERPRET and importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None

"""What this machine has for computing on a CPU: free memory, and whether to multiply in bfloat16."""

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Files of a container's limit on memory and of what it uses: control groups of version 2, and of version 1.
_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_LARGE = 1 << 27  # multiplications of a product that is worth converting its factors


def free_bytes() -> int:
    """Memory that this process can still have: what the system has free, within its container's limit."""
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024]
    for limit, used in _CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
            counts = dict(line.split() for line in Path(used).with_name("memory.stat").read_text().splitlines())
            files = int(counts.get("inactive_file", 0))  # given up when needed
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()) + files)
    return max(0, min(free))


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it: about five times as fast as float32. An older PyTorch does not tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def rough_product(left: Tensor, right: Tensor, onto: Tensor | None = None) -> Tensor:
    """`left @ right` in float32, of matrices; a large one to a part in 400 where a CPU is much faster then.

    Args:
        onto: [rows, columns] float32, to which it is added in place.
    """
    large = left.shape[0] * left.shape[1] * right.shape[1] >= _LARGE
    if large and left.device.type == "cpu" and multiplies_bfloat16():
        product = (left.bfloat16() @ right.bfloat16()).float()
        return product if onto is None else onto.add_(product)
    left, right = left.float(), right.float()
    return left @ right if onto is None else onto.addmm_(left, right)

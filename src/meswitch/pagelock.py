"""Host memory that a GPU copies from at full speed, locked without holding up those who launch kernels.

To lock pages the driver holds a lock that every launch takes: `pin_memory=True` stops all streams of the process for
half a second a GB, and PyTorch keeps a power of two of bytes. Here the pages are asked for first, without the driver,
and then locked piece by piece. A copy must not span two pieces, hence `copy_locked`.
"""

import contextlib
import mmap
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from meswitch.errors import CapacityError

_PIECE = 1 << 24  # bytes; pieces begin at multiples of it, so that a copy sees from its address where they do
_PAUSE = 0.0005  # seconds after each, in which launches get the driver's lock


def page_locked(nbytes: int, device: torch.device) -> Tensor:
    """[nbytes] uint8 in host memory; for a GPU page-locked, and unlocked in the background once nobody holds it.

    Args:
        device: what copies from it or to it, by `copy_locked`.

    Raises:
        CapacityError: the driver did not lock it.
    """
    if device.type != "cuda" or not nbytes:
        return torch.empty(nbytes, dtype=torch.uint8)
    if sys.platform != "linux":
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)  # or the device may go on with pages that a fork took from this process
    with contextlib.suppress(OSError):  # not every kernel has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.uint8)
    tensor = torch.from_numpy(array)  # holds the array
    locked: list[slice] = []
    weakref.finalize(array, _give_back, memory, tensor.data_ptr(), locked, device).atexit = False
    for part in _parts(tensor):
        tensor[part].zero_()  # the system gives the pages
        _lock(tensor[part], device)
        locked.append(part)
        time.sleep(_PAUSE)
    return tensor


def copy_locked(target: Tensor, source: Tensor, *, non_blocking: bool = False) -> None:
    """`target.copy_(source)` between a device and (a part of) what `page_locked` gave.

    Args:
        target: [bytes] uint8, contiguous.
        source: alike.
    """
    for part in _parts(source if target.is_cuda else target):
        target[part].copy_(source[part], non_blocking=non_blocking)


def _parts(host: Tensor) -> Iterator[slice]:
    """What of it lies in one piece each."""
    start, end = 0, host.numel()
    while start < end:
        stop = min(end, start + _PIECE - (host.data_ptr() + start) % _PIECE)
        yield slice(start, stop)
        start = stop


def _lock(piece: Tensor, device: torch.device) -> None:
    error = torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), piece.numel(), 0)
    if int(error):
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)  # CUDA reports the error once more, to the thread's next launch: this one
        raise CapacityError(
            f"host memory for an expert could not be page-locked ({error}): keep fewer experts in host memory, or "
            "allow the process more"
        )


def _give_back(memory: mmap.mmap, address: int, locked: list[slice], device: torch.device) -> None:
    threading.Thread(target=_unlock, args=(memory, address, locked, device), daemon=True).start()


def _unlock(memory: mmap.mmap, address: int, locked: list[slice], device: torch.device) -> None:
    """To the system, piece by piece too: gigabytes at once would hold up whoever asks it for memory."""
    torch.cuda.synchronize(device)  # a copy from it may be on its way
    for part in locked:
        torch.cuda.cudart().cudaHostUnregister(address + part.start)
        memory.madvise(mmap.MADV_DONTNEED, part.start, part.stop - part.start)
        time.sleep(_PAUSE)

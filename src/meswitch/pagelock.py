"""Host memory that a GPU copies from at full speed, locked without holding up those who launch kernels.

To lock pages the driver holds a lock that every launch takes: `pin_memory=True` stops all streams of the process for
half a second a GB, and PyTorch keeps a power of two of bytes. Here the pages are asked for first, without the driver,
and then locked piece by piece. A copy must not span two pieces, hence `copy`.
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
# Bytes of one copy, a part of a piece. One copy engine does all that go the same way, in turns: what a step is told of
# its tokens waits for the part that is on its way, of these for less than a tenth of a millisecond.
_AT_ONCE = 1 << 22


def page_locked(nbytes: int, device: torch.device) -> Tensor:
    """[nbytes] uint8 in host memory; for a GPU page-locked, and unlocked in the background once nobody holds it.

    Args:
        device: what copies from it or to it, by `copy`.

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
    for part in _parts(tensor, _PIECE):
        tensor[part].zero_()  # the system gives the pages
        _lock(tensor[part], device)
        locked.append(part)
        time.sleep(_PAUSE)
    return tensor


def copy(target: Tensor, source: Tensor, *, non_blocking: bool = False) -> None:
    """`target.copy_(source)` between a device and (a part of) what `page_locked` gave, in the current stream's order.

    Args:
        target: [bytes] uint8, contiguous.
        source: alike.
        non_blocking: do not wait for it; of use only on a GPU.
    """
    host, device = (source, target) if target.is_cuda else (target, source)
    for part in _parts(host, _AT_ONCE):
        target[part].copy_(source[part], non_blocking=True)
    if device.is_cuda and not non_blocking:
        torch.cuda.current_stream(device.device).synchronize()


def _parts(host: Tensor, size: int) -> Iterator[slice]:
    """What of it lies between two multiples of `size` bytes each."""
    start, end = 0, host.numel()
    while start < end:
        stop = min(end, start + size - (host.data_ptr() + start) % size)
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

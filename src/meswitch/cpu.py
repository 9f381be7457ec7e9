"""Computing on a CPU: how many threads, how they wait for each other, free memory, and whether to multiply in bfloat16.

Operations of a small model take microseconds, and torch's OpenMP lets a thread that waits for another spin for about a
millisecond. Beside a busy process the other may not run at all for longer than that, so spinning threads take the very
time that the other needs: a job of half a minute took several. Hence two rules. Threads sleep while they wait
(`wait_passively`), which has to be said before torch is loaded. And a job takes no more threads than its model
deserves and than there are cores that nobody else keeps busy (`fitting`). `OMP_NUM_THREADS` and `OMP_WAIT_POLICY` of
the environment come before both.
"""

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NARROW = 512  # hidden size up to which one thread is faster than several
WAIT = {"OMP_WAIT_POLICY": "PASSIVE"}
_SET_BY_USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_set_here: dict[str, str] = {}
_EVERY = 2.0  # seconds between two looks at who is busy
# Files of a container's limit on memory and of what it uses: control groups of version 2, and of version 1.
_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_LARGE = 1 << 27  # multiplications of a product that is worth converting its factors


def wait_passively() -> None:
    """Let threads of this process, and of those that it starts, sleep while they wait; the user's own choice stays.

    Without effect once torch is loaded: its OpenMP (GNU's, in the wheels for Linux) reads the environment only then.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _SET_BY_USERS):
        os.environ.update(WAIT)
        _set_here.update(WAIT)


def users_environment() -> dict[str, str]:
    """The environment without what was set here, for programs that choose their threads themselves."""
    return {name: value for name, value in os.environ.items() if _set_here.get(name) != value}


def deserves_one(device: "torch.device", hidden_size: int) -> bool:
    """Whether a model's layers are so small on this device that sharing them costs more than it saves.

    Its operations take microseconds: 1,000 questions to a model of hidden size 128 took 17.7 s on two threads and
    9.0 s on one.
    """
    return device.type == "cpu" and hidden_size <= NARROW


def fitting(device: "torch.device", hidden_size: int, most: int) -> int:
    """Threads for a model: one for a narrow one, else as many as there are cores that others leave free.

    Args:
        device: where it computes; on a GPU the number stays as it is.
        most: threads that it may have.
    """
    if deserves_one(device, hidden_size):
        return 1
    return most if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ else min(most, _load.free())


@contextlib.contextmanager
def fitting_threads(device: "torch.device", hidden_size: int) -> Iterator[None]:
    """Compute with `fitting` threads, in the thread that calls; as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(fitting(device, hidden_size, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class StepThreads:
    """Threads of a loop that computes step after step: narrow or not is known, who else is busy changes.

    Args:
        device: as `fitting` takes it.
        hidden_size: likewise.
    """

    def __init__(self, device: "torch.device", hidden_size: int) -> None:
        self._device, self._hidden_size = device, hidden_size
        self._looked, self._most = -_EVERY, 0

    def settle(self) -> None:
        """In the loop's own thread, before a step: torch counts threads for each thread that computes."""
        now = time.monotonic()
        if now - self._looked >= _EVERY:
            import torch

            self._looked = now
            self._most = self._most or torch.get_num_threads()
            wanted = fitting(self._device, self._hidden_size, self._most)
            if wanted != torch.get_num_threads():
                torch.set_num_threads(wanted)


class _Load:
    """How many cores others keep busy: what Linux counts of all processes, less what this one used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        self._before = self._read()
        self._busy = 0.0

    def free(self) -> int:
        """Cores that this process may use and nobody else does, at least one."""
        with self._lock:
            if time.monotonic() - self._before[0] >= _EVERY / 2:
                now = self._read()
                seconds, used, own = (after - before for after, before in zip(now, self._before, strict=True))
                self._busy, self._before = max(0.0, (used - own) / seconds), now
            return max(1, len(self._cores) - round(self._busy))

    def _read(self) -> tuple[float, float, float]:
        """The time, what all processes have used of the cores, and what this one has, in seconds."""
        used = 0.0
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in Path("/proc/stat").read_text().splitlines():
                name, *fields = line.split()
                if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self._cores:
                    user, nice, system = (int(field) for field in fields[:3])
                    used += (user + nice + system) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), used, time.process_time()


_load = _Load()


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
    import torch

    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def rough_product(left: "Tensor", right: "Tensor", onto: "Tensor | None" = None) -> "Tensor":
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

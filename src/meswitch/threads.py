"""How many torch threads a model deserves."""

import contextlib
from collections.abc import Iterator

import torch

NARROW = 512  # hidden size up to which one thread is faster than several


def deserves_one(device: torch.device, hidden_size: int) -> bool:
    """Whether a model's layers are so small on this device that sharing them costs more than it saves.

    Its operations take microseconds: 1,000 questions to a model of hidden size 128 took 17.7 s on two threads and
    9.0 s on one, and where something else is busy, threads that wait for each other cost a hundred times that.
    """
    return device.type == "cpu" and hidden_size <= NARROW


@contextlib.contextmanager
def fitting_threads(device: torch.device, hidden_size: int) -> Iterator[None]:
    """One torch thread for a narrow model on the CPU, in the thread that calls; as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if deserves_one(device, hidden_size) else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

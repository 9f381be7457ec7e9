"""CUDA graphs for questions that are asked one at a time.

A small model's forward pass on a GPU is a thousand launches, each shorter than it takes Python to ask for it. Captured
once, all of them are one call.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("meswitch.router")

WIDTHS = (32, 64, 128, 256)  # tokens after the prefix; a row is padded to the next of these

# Graphs share memory and write to fixed places, so one is captured or replayed at a time.
_LOCK = threading.Lock()


class PrefixGraphs:
    """What follows one kept prefix, as one graph a width, each captured when it is first needed.

    Args:
        run: (ids [1, width] int64, pads [1, 1] int64) -> [1, letters] float32, with `pads` tokens of padding on the
            left. All on `device`: a graph can neither copy from the host nor read anything back.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> None:
        self._run = run
        self._device = device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool: Any = None
        self._refused = False

    def __call__(self, row: Sequence[int]) -> Tensor | None:
        """[letters] float32 on the CPU. None: the row is wider than any graph, or this model cannot be captured."""
        width = next((width for width in WIDTHS if width >= len(row)), None)
        if width is None or self._refused:
            return None
        pads = width - len(row)
        with _LOCK, torch.cuda.device(self._device):
            if width not in self._graphs:
                self._capture(width)
            if self._refused:
                return None
            graph, given, logits = self._graphs[width]
            given.copy_(torch.tensor([[pads, *[0] * pads, *row]]))
            graph.replay()
            return logits[0].cpu()

    def _capture(self, width: int) -> None:
        given = torch.zeros(1, 1 + width, dtype=torch.int64, device=self._device)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries set themselves up in their first calls, which cannot be captured
                    self._run(given[:, 1:], given[:, :1])
            torch.cuda.current_stream().wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread, such as an engine's, may allocate meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._run(given[:, 1:], given[:, :1])
            self._graphs[width] = graph, given, logits
        except RuntimeError as error:  # out of memory, say
            logger.warning("router: this model cannot be captured as a CUDA graph (%s); queries take longer", error)
            self._refused = True

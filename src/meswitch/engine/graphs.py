"""Decode steps over static buffers, as CUDA graphs on a GPU: one for each size, captured when the engine opens.

A step of a few dozen tokens takes less time on the card than Python needs to start its kernels, so it is recorded once
and replayed: only the buffers that say whose token is where are filled anew. What does not fit, such as a step with a
prompt in it, is computed without a graph.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from meswitch.engine.attention import KVCache, Piece, running
from meswitch.engine.context import BASE_SLOT, StepContext, Switch, TableOwners
from meswitch.engine.decode import DecodePlaces
from meswitch.engine.layers import Switchable, SwitchableEmbedding, SwitchableHead, SwitchableLinear
from meswitch.engine.scheduler import Job
from meswitch.engine.tables import Own, OwnTables
from meswitch.errors import IncompatibleError
from meswitch.ops.step import Step

logger = logging.getLogger("meswitch.engine")

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64)  # rows; up to those of the fused kernel


def own_tables(model: Any, slots: int, ranks: Mapping[str, int]) -> OwnTables:
    """The tables that a model's wrapped layers look up.

    Args:
        slots: of the expert store.
        ranks: stored names of which some expert has a low-rank delta -> the highest rank.

    Raises:
        IncompatibleError: a layer that cannot be computed from tables.
    """
    wanted: dict[str, Own] = {}
    low_rank: dict[str, tuple[Tensor, int]] = {}
    read: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, Switchable):
            found = module.looked_up
            if found is None:
                raise IncompatibleError(f"{name}: a {type(module.base).__name__} is computed for each expert apart")
            wanted |= {own.name: own for own in found}
            read |= module.names
            if isinstance(module, SwitchableLinear | SwitchableHead | SwitchableEmbedding):
                weight = module.weight_name
                low_rank |= {weight: (module.base.weight, ranks[weight])} if weight in ranks else {}
    return OwnTables(slots, list(wanted.values()), low_rank, frozenset(read - wanted.keys() - low_rank.keys()))


class DecodeSteps:
    """Computes steps in which every request has one token.

    Args:
        model: the base with its wrapped layers.
        switch: their running step.
        cache: keys and values.
        step: the kernels' buffers.
        tables: what the layers look up.
        rows: of the largest step.
        longest: tokens of the longest text.

    Raises:
        IncompatibleError: its attention cannot be computed over static buffers.
    """

    def __init__(
        self, model: Any, switch: Switch, cache: KVCache, step: Step, tables: OwnTables, *, rows: int, longest: int
    ) -> None:
        self._model, self._switch, self._tables = model, switch, tables
        self._side, self._device = step.tokens, step.tokens.token_slots.device
        self.sizes = tuple(sorted({min(size, rows) for size in SIZES}))
        self._places = DecodePlaces(cache, self.sizes[-1], longest, self._device)
        self._spare = cache.spare
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.expert_steps = 0
        self._told: set[str] = set()  # owners of whom the log has been told
        self.nbytes = tables.nbytes
        """Device memory of the graphs, and of what the layers look up."""

    def run(self, step: Sequence[tuple[Job, Piece]]) -> Tensor | None:
        """[requests, vocabulary] logits, which the next step overwrites; None if this is another kind of step."""
        if len(step) > self.sizes[-1] or any(piece.length > 1 for _, piece in step):
            return None
        slots = [job.slot for job, _ in step]
        for job, _ in step:
            if job.slot != BASE_SLOT and not self._tables.fill(job.slot, self._switch.tensors(job.slot)):
                if job.owner not in self._told:
                    self._told.add(job.owner)
                    logger.warning("%s has tensors outside of tables: steps with it run without graphs", job.owner)
                return None
        self._places.fill([job.tokens[piece.past] for job, piece in step], [piece for _, piece in step])
        if self._side.host != slots:
            self._side.fill(slots)
        self.expert_steps += self._side.active
        size = next(size for size in self.sizes if size >= len(step))
        if size not in self._captured:
            return self._forward(size)[: len(step)]
        graph, logits = self._captured[size]
        graph.replay()
        return logits[: len(step)]

    def capture(self, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Record a graph of each size. In the thread that computes, with nothing else in it.

        Args:
            told: how many are done, of how many.

        Raises:
            Exception: whatever keeps the model from being recorded.
        """
        found: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        for done, size in enumerate(reversed(self.sizes)):  # the largest first: the others find room in its memory
            told(done, len(self.sizes))
            pieces = [Piece(1, 0, [self._spare])] * size
            self._places.fill([0] * size, pieces)
            # every row an expert's: the steps that are replayed have at most so many pieces
            self._side.fill([row % max(1, self._tables.slots) for row in range(size)])
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                self._forward(size)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            # other threads copy experts meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                logits = self._forward(size)
            found[size] = graph, logits
        torch.cuda.synchronize(self._device)
        self._side.fill([])
        self._captured = found
        segments = torch.cuda.memory.memory_snapshot()
        own = (part["total_size"] for part in segments if part.get("segment_pool_id") == pool)
        self.nbytes = self._tables.nbytes + sum(own)

    def _forward(self, rows: int) -> Tensor:
        owners = TableOwners(self._side, rows)
        self._switch.step = StepContext(owners, owners)
        ids, positions = (numbers[None, :rows] for numbers in (self._places.ids, self._places.positions))
        with running(self._places):
            output = self._model(input_ids=ids, position_ids=positions, use_cache=False, paged=self._places)
        logits: Tensor = output.logits[0]
        return logits

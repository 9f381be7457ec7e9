"""Steps over static buffers, as CUDA graphs on a GPU: one for each size, captured when the engine opens.

A step of up to a few hundred tokens takes less time on the card than Python needs to start its kernels, so it is
recorded once and replayed: only the buffers that say whose token is where are filled anew. What does not fit, such as a
long prompt, is computed without a graph.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from meswitch.engine.attention import KVCache, Piece, running
from meswitch.engine.context import BASE_SLOT, StepContext, Switch, TableOwners
from meswitch.engine.layers import Switchable, SwitchableEmbedding, SwitchableHead, SwitchableLinear
from meswitch.engine.scheduler import Job
from meswitch.engine.static_attention import StaticPlaces
from meswitch.engine.tables import Own, OwnTables
from meswitch.errors import IncompatibleError
from meswitch.ops.routing import MAX_TOKENS
from meswitch.ops.step import Step

logger = logging.getLogger("meswitch.engine")

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 96, 128, 192, 256, 384, 512)  # rows
MOST = SIZES[-1]
_KEYS = 1 << 20  # that a step's prompts see, row by row: reading more takes longer than Python


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


class StaticSteps:
    """Computes steps over static buffers.

    Args:
        model: the base with its wrapped layers.
        switch: their running step.
        cache: keys and values.
        step: the kernels' buffers.
        tables: what the layers look up.
        rows: of the largest step.
        requests: of the largest step.
        longest: tokens of the longest text.
        cuts_rows: the model takes `logits_to_keep`.

    Raises:
        IncompatibleError: its attention cannot be computed over static buffers.
    """

    def __init__(
        self,
        model: Any,
        switch: Switch,
        cache: KVCache,
        step: Step,
        tables: OwnTables,
        *,
        rows: int,
        requests: int,
        longest: int,
        cuts_rows: bool,
    ) -> None:
        self._model, self._switch, self._tables = model, switch, tables
        self._step, self._device = step, step.tokens.token_slots.device
        self.sizes = tuple(sorted({min(size, rows) for size in SIZES}))
        self._places = StaticPlaces(cache, sorted({min(MAX_TOKENS, rows), self.sizes[-1]}), longest, self._device)
        self._spare, self._requests, self._cuts_rows = cache.spare, requests, cuts_rows
        self._kept = torch.zeros(requests, dtype=torch.int64, device=self._device)  # rows whose logits are wanted
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.expert_steps = 0
        self._told: set[str] = set()  # owners of whom the log has been told
        self.nbytes = tables.nbytes
        """Device memory of the graphs, and of what the layers look up."""

    def run(self, step: Sequence[tuple[Job, Piece]]) -> Tensor | None:
        """The logits of each text's last token, if it is in the step.

        Returns:
            [rows, vocabulary], which the next step overwrites; None if this is another kind of step.
        """
        rows = sum(piece.length for _, piece in step)
        if rows > self.sizes[-1] or len(step) > self._requests:
            return None
        if sum(piece.length * (piece.past + piece.length) for _, piece in step if piece.length > 1) > _KEYS:
            return None
        for job, _ in step:
            if job.slot != BASE_SLOT and not self._tables.fill(job.slot, self._switch.tensors(job.slot)):
                if job.owner not in self._told:
                    self._told.add(job.owner)
                    logger.warning("%s has tensors outside of tables: steps with it run without graphs", job.owner)
                return None
        ids, slots, kept = list[int](), list[int](), list[int]()
        for job, piece in step:
            end = piece.past + piece.length
            ids += job.tokens[piece.past : end]
            slots += [job.slot] * piece.length
            if end == len(job.tokens):
                kept.append(len(ids) - 1)
        size = next(size for size in self.sizes if size >= rows)
        self._places.fill(ids, [piece for _, piece in step])
        self._fill(size, slots, kept)
        self.expert_steps += self._step.tokens.active
        if size in self._captured:
            graph, logits = self._captured[size]
            graph.replay()
        else:
            logits = self._forward(size)
        if size <= MAX_TOKENS or not self._cuts_rows:  # all rows have logits
            return logits[:rows] if len(kept) == rows else logits[self._numbers(kept)]
        return logits[: len(kept)]

    def _numbers(self, rows: Sequence[int]) -> Tensor:
        """[rows] int64 on the device."""
        numbers = torch.tensor(rows, dtype=torch.int64)
        return numbers.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else numbers

    def _fill(self, size: int, slots: Sequence[int], kept: Sequence[int]) -> None:
        """Say whose the rows are, and which logits are wanted."""
        tokens, head = self._step.tokens, self._step.head
        if size > MAX_TOKENS:  # such a graph reads other buffers than a smaller one, and computes all of its rows
            slots = [*slots, *[BASE_SLOT] * (size - len(slots))]
        if tokens.host != slots:
            tokens.fill(slots)
        if size <= MAX_TOKENS or not self._cuts_rows:
            return
        more = min(size, self._requests) - len(kept)
        owners = [*(slots[row] for row in kept), *[BASE_SLOT] * more]
        if head.host != owners:
            head.fill(owners)
        head.active = tokens.active
        self._kept[: len(owners)].copy_(self._numbers([*kept, *[0] * more]))

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
            self._places.fill([0] * size, [Piece(1, 0, [self._spare])] * size)
            # every row an expert's: the steps that are replayed have at most so many pieces
            slots = [row % max(1, self._tables.slots) for row in range(size)]
            self._fill(size, slots, range(min(size, self._requests)))
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
        for side in self._step.sides:
            side.fill([])
        self._captured = found
        segments = torch.cuda.memory.memory_snapshot()
        own = (part["total_size"] for part in segments if part.get("segment_pool_id") == pool)
        self.nbytes = self._tables.nbytes + sum(own)

    def _forward(self, rows: int) -> Tensor:
        """[rows, vocabulary]; of a larger step than the fused kernel takes only the rows in `_kept`, if that can be."""
        owners = TableOwners(self._step.tokens, rows)
        of_logits, cut = owners, {}
        if rows > MAX_TOKENS and self._cuts_rows:
            count = min(rows, self._requests)
            of_logits, cut = TableOwners(self._step.head, count), {"logits_to_keep": self._kept[:count]}
        self._switch.step = StepContext(owners, of_logits)
        ids, positions = (numbers[None, :rows] for numbers in (self._places.ids, self._places.positions))
        with running(self._places):
            output = self._model(input_ids=ids, position_ids=positions, use_cache=False, paged=self._places, **cut)
        logits: Tensor = output.logits[0]
        return logits

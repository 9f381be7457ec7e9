"""Steps over static buffers, as CUDA graphs on a GPU: one for each size and number of experts, captured at opening.

A step of up to a few hundred tokens takes less time on the card than Python needs to start its kernels, so it is
recorded once and replayed: only the buffers that say whose token is where are filled anew. What does not fit, such as a
long prompt, is computed without a graph.

Attention: each row is a text of its own. A token sees the pages of its request up to itself, so tokens of a prompt and
the next tokens of answers are one kind of row. On a GPU it is FlexAttention over the pages; a block of its mask is a
page. Its Triton kernel is made by torch when it is first called, which is before graphs are captured. Elsewhere the
same buffers are read by plain torch, the reference.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from meswitch.engine.attention import NOT_NEEDED, PAGE, KVCache, Piece, pages_for, running
from meswitch.engine.coded import CodedLinear
from meswitch.engine.context import BASE_SLOT, StepContext, Switch, TableOwners
from meswitch.engine.layers import Switchable, SwitchableEmbedding, SwitchableHead, SwitchableLinear
from meswitch.engine.scheduler import Job
from meswitch.engine.scores import ints
from meswitch.engine.tables import Own, OwnTables
from meswitch.errors import IncompatibleError
from meswitch.ops.routing import MAX_TOKENS, expert_counts, into

logger = logging.getLogger("meswitch.engine")

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 96, 128, 192, 256, 384, 512)  # rows of the graphs
MOST = SIZES[-1]
_KEYS = 1 << 20  # that the rows of a step's prompts see in all; above, attention takes longer than Python would
# What a layer may hand to its attention without wanting more than scaled dot products, with a soft cap or without.
_PLAIN = {"scaling", "softcap", "dropout", "sliding_window", "is_causal", "use_cache"} | NOT_NEEDED
_SPLITS = 4  # programs that share one row's keys: long texts of few requests keep the card busy
_QUERY_BLOCK = 128  # of a mask; a row's queries are one a head of the group, always fewer
_COMPARED = 32  # rows of a step: enough to see a difference, few enough to gather all that they see
# Of the norm of an attention's output: by more it differs from the model's own for another reason than 16 bit.
_OWN = 0.03


@dataclass(frozen=True, slots=True)
class _Table:
    """The pages that each row sees in layers of one window.

    Args:
        window: tokens that are seen, None for all.
        numbers: [5, rows] int32: how many pages, the first page, the position in it from which on keys are seen, the
            last page, the number of keys that are seen in it.
        pages: [rows, pages] int32.
        host_pages: the same, page-locked for a GPU.
        filled: by row, the pages that `pages` is known to hold; () where it is not known.
    """

    window: int | None
    numbers: Tensor
    pages: Tensor
    host_pages: Tensor
    filled: list[tuple[int, ...]]

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Which keys of a page a row sees, as FlexAttention asks."""
        _, first, since, last, until = self.numbers.unbind(0)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            page, place = key // PAGE, key % PAGE
            begun = (page != first[row]) | (place >= since[row])
            return begun & ((page != last[row]) | (place < until[row]))

        return sees

    def fill(self, pieces: Sequence[Piece]) -> Tensor:
        """Lay a step out; gives the numbers, on the host."""
        filled, self.filled[:] = list(self.filled), [()] * len(self.filled)  # if something fails, nothing is known
        found = torch.zeros(self.numbers.shape, dtype=torch.int32)
        row, last_changed, numbers = 0, 0, list[tuple[int, ...]]()
        for piece in itertools.takewhile(lambda piece: piece.length == 1, pieces):  # of most steps these are all
            end = piece.past + 1
            begin = 0 if self.window is None else max(0, end - self.window)
            known = tuple(piece.pages[begin // PAGE : pages_for(end)])
            numbers.append((len(known), known[0], begin % PAGE, known[-1], (end - 1) % PAGE + 1))
            if filled[row] != known:
                filled[row] = known
                self.host_pages[row, : len(known)] = torch.tensor(known, dtype=torch.int32)
                last_changed = row + 1
            row += 1
        if numbers:
            found[:, :row] = torch.tensor(numbers, dtype=torch.int32).T
        for piece in pieces[row:]:
            rows = slice(row, row + piece.length)
            last = torch.arange(piece.past, piece.past + piece.length)  # the position of each row's own token
            start = torch.zeros_like(last) if self.window is None else (last - self.window + 1).clamp(min=0)
            pages = torch.tensor(piece.pages[: pages_for(piece.past + piece.length)])
            first, count = start // PAGE, last // PAGE - start // PAGE + 1
            found[:, rows] = torch.stack(
                [count, pages[first], start % PAGE, pages[last // PAGE], last % PAGE + 1]
            ).int()
            seen = first[:, None] + torch.arange(int(count.max()))
            self.host_pages[rows, : seen.shape[1]] = pages[seen.clamp(max=len(pages) - 1)].int()
            filled[rows] = [()] * piece.length
            row = last_changed = rows.stop
        if last_changed:
            self.pages[:last_changed].copy_(self.host_pages[:last_changed], non_blocking=True)
        self.filled[:] = filled
        return found


class StaticPlaces:
    """Where the rows of a step are, in static buffers.

    Args:
        cache: of keys and values, with a page to spare.
        sizes: ascending, rows for which the card's kernel is made; a step's rows go to the next of them.
        longest: tokens of the longest text.
    """

    def __init__(self, cache: KVCache, sizes: Sequence[int], longest: int, device: torch.device) -> None:
        self._cache, self._sizes, self._rows, self._device = cache, tuple(sizes), sizes[-1], device
        self._is_flex = device.type == "cuda"
        self._inputs = torch.zeros(3, self._rows, dtype=torch.int64, device=device)
        self.ids, self.positions, self.writes = self._inputs
        self._writes_nowhere = cache.spare * PAGE
        pages = pages_for(longest)
        self._tables = {window: self._table(window, pages) for window in dict.fromkeys(cache.windows)}
        self._masks: dict[tuple[int | None, int, int], BlockMask] = {}
        self._compared: set[nn.Module] = set()

    def _table(self, window: int | None, pages: int) -> _Table:
        host = torch.zeros(self._rows, pages, dtype=torch.int32, pin_memory=self._is_flex)
        numbers = torch.zeros(5, self._rows, dtype=torch.int32, device=self._device)
        return _Table(window, numbers, host.to(self._device, copy=True), host, [()] * self._rows)

    def fill(self, ids: Sequence[int], pieces: Sequence[Piece]) -> None:
        """Lay a step out: [rows] token ids, and where each is. Rows after these write to a page of nobody."""
        positions, writes = list[int](), list[int]()
        for piece in pieces:
            own = range(piece.past, piece.past + piece.length)
            positions += own
            writes += [piece.pages[position // PAGE] * PAGE + position % PAGE for position in own]
        more = self._rows - len(ids)
        inputs = [[*ids, *[0] * more], [*positions, *[0] * more], [*writes, *[self._writes_nowhere] * more]]
        into(self._inputs, torch.tensor(inputs))
        for table in self._tables.values():
            into(table.numbers, table.fill(pieces))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """As `StepPlaces.attend`.

        Raises:
            IncompatibleError: the layer wants more than scaled dot products, or computes more by itself.
        """
        for name, option in options.items():
            if name not in _PLAIN and option is not None:
                raise IncompatibleError(f"{type(module).__name__}: its attention is given {name}")
        if options.get("dropout"):
            raise IncompatibleError(f"{type(module).__name__}: dropout while it answers")
        cap = options.get("softcap")
        if cap is not None and self._cache.function == "sdpa":  # which leaves it out
            raise IncompatibleError(f"{type(module).__name__}: its attention is given softcap")
        window, keys, values = self._cache.layer(module, key, value)
        rows, groups = query.shape[2], query.shape[1] // key.shape[1]
        keys.index_copy_(0, self.writes[:rows], key[0].transpose(0, 1))
        values.index_copy_(0, self.writes[:rows], value[0].transpose(0, 1))
        # the heads that share keys are the queries of one head: each sees the same
        grouped = query[0].transpose(0, 1).reshape(rows, key.shape[1], groups, query.shape[3])
        table, scale = self._tables[window], options.get("scaling")
        if self._is_flex:
            size = next(size for size in self._sizes if size >= rows)
            whole = grouped
            if rows < size:  # few kernels for steps of all sizes
                whole = grouped.new_zeros(size, *grouped.shape[1:])
                whole[:rows] = grouped
            attended = _flex()(
                whole,
                *(t[None].transpose(1, 2) for t in (keys, values)),
                score_mod=None if cap is None else _capped(cap),
                block_mask=self._mask(table, size, groups, len(keys)),
                scale=scale,
                kernel_options={"SPLIT_KV": _SPLITS},
            )[:rows]
        else:
            attended = reference(grouped, keys, values, table.numbers[:, :rows], table.pages[:rows], scale, cap)
        attended = attended.reshape(1, rows, query.shape[1], value.shape[3])
        if self._cache.function == "eager" and module not in self._compared:  # before graphs are captured
            self._compare(module, query, keys, values, table, options, attended)
            self._compared.add(module)
        return attended, None

    def _compare(
        self,
        module: nn.Module,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        table: _Table,
        options: Mapping[str, Any],
        attended: Tensor,
    ) -> None:
        """Refuse a layer whose own attention gives something else: it may look at its module, not only at options."""
        rows = table.numbers[0, : query.shape[2]].nonzero()[:_COMPARED, 0]  # what sees no page is nobody's
        mine, theirs, mask = _gathered(keys, values, table.numbers[:, rows], table.pages[rows])
        queries, mine, theirs = (t.float() for t in (query[0].transpose(0, 1)[rows, :, None], mine, theirs))
        given = {name: option for name, option in options.items() if name not in NOT_NEEDED}
        allowed = self._cache.allowed(mask[:, None, None], torch.float32)
        own = self._cache.own(module)(module, queries, mine, theirs, allowed, **given)[0][:, 0]
        error = float((attended[0, rows].float() - own).norm() / own.norm().clamp_min(1e-30))
        if not error <= _OWN:
            name = type(module).__name__
            raise IncompatibleError(f"{name}: its attention differs from scaled dot products by {error:.0%}")

    def _mask(self, table: _Table, rows: int, queries: int, places: int) -> BlockMask:
        """One for all layers of a window, over the table's buffers."""
        key = table.window, rows, queries
        if key not in self._masks:
            none = torch.zeros(rows, 1, places // PAGE, 1, dtype=torch.int32, device=self._device)
            self._masks[key] = BlockMask(
                seq_lengths=(queries, places),
                kv_num_blocks=table.numbers[0][:rows, None, None],
                kv_indices=table.pages[:rows, None, None],
                full_kv_num_blocks=None,
                full_kv_indices=None,
                q_num_blocks=none[..., 0],  # of gradients, which nobody asks for
                q_indices=none,
                full_q_num_blocks=None,
                full_q_indices=None,
                BLOCK_SIZE=(_QUERY_BLOCK, PAGE),
                mask_mod=table.mask_mod(),
            )
        return self._masks[key]


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    numbers: Tensor,
    pages: Tensor,
    scale: float | None,
    cap: float | None = None,
) -> Tensor:
    """What FlexAttention computes of these buffers: [rows, heads, queries, width] of query's dtype.

    Args:
        query: [rows, heads, queries, width].
        keys: [places, heads, width].
        values: [places, heads, width].
        numbers: see `_Table`.
        pages: [rows, pages] int32.
        scale: of the products; None for one by the root of width.
        cap: scores are `cap * tanh(score / cap)` (Gemma 2, arXiv 2408.00118, section 2); None leaves them.
    """
    mine, theirs, mask = _gathered(keys, values, numbers, pages)
    if cap is not None:
        products = query @ mine.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = (cap * torch.tanh(products / cap)).masked_fill(~mask[:, None, None], float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ theirs
    return nn.functional.scaled_dot_product_attention(query, mine, theirs, mask[:, None, None], scale=scale)


def _gathered(keys: Tensor, values: Tensor, numbers: Tensor, pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's keys and values, [rows, heads, places, width], and which it sees, [rows, places] bool."""
    count, _, since, last, until = numbers.long()
    most = int(count.max())
    number = torch.arange(most * PAGE, device=keys.device)
    # what is beyond a text's pages is masked, but a number that is none would get through the mask
    own = torch.where(torch.arange(most, device=keys.device) < count[:, None], pages[:, :most].long(), last[:, None])
    places = own[..., None] * PAGE + torch.arange(PAGE, device=keys.device)
    ends = (count - 1) * PAGE + until
    mine, theirs = (t[places.flatten(1)].transpose(1, 2) for t in (keys, values))
    return mine, theirs, (number >= since[:, None]) & (number < ends[:, None])


@functools.cache
def _capped(cap: float) -> Callable[..., Tensor]:
    """How FlexAttention changes a score; one function for each cap, since another one is compiled anew."""

    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@functools.cache
def _flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


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
                if weight in ranks:
                    base = module.base
                    low_rank[weight] = base.outline if isinstance(base, CodedLinear) else base.weight, ranks[weight]
    return OwnTables(slots, list(wanted.values()), low_rank, frozenset(read - wanted.keys() - low_rank.keys()))


class StaticSteps:
    """Computes steps over static buffers.

    Args:
        model: the base with its wrapped layers.
        switch: their running step, with the kernels' buffers and the tables that the layers look up.
        cache: keys and values.
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
        *,
        rows: int,
        requests: int,
        longest: int,
        cuts_rows: bool,
    ) -> None:
        assert switch.buffers is not None
        assert switch.tables is not None
        self._model, self._switch, self._tables, self._step = model, switch, switch.tables, switch.buffers
        self._device = switch.buffers.tokens.token_slots.device
        self.sizes = tuple(sorted({min(size, rows) for size in SIZES}))
        self._places = StaticPlaces(cache, sorted({min(MAX_TOKENS, rows), self.sizes[-1]}), longest, self._device)
        self._spare, self._requests, self._cuts_rows = cache.spare, requests, cuts_rows
        self._kept = torch.zeros(requests, dtype=torch.int64, device=self._device)  # rows whose logits are wanted
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.expert_steps = 0
        self._told: set[str] = set()  # owners of whom the log has been told
        self.nbytes = self._tables.nbytes
        """Device memory of the graphs, and of what the layers look up."""

    def run(self, step: Sequence[tuple[Job, Piece]]) -> Tensor | None:
        """The logits of the last token of each text that the step computes to its end.

        Returns:
            [texts, vocabulary], which the next step overwrites; None if such a step cannot be computed here: nothing
            has changed then.
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
        captured = self._captured.get((size, self._experts_of_graph(size)))
        if captured is not None:
            graph, logits = captured
            graph.replay()
        else:
            logits = self._forward(size)
        if size <= MAX_TOKENS or not self._cuts_rows:  # all rows have logits
            return logits[:rows] if len(kept) == rows else logits[ints(kept, self._device)]
        return logits[: len(kept)]

    @property
    def graphs(self) -> list[tuple[int, int]]:
        """Rows and experts of each graph, the largest first: the others find room in its memory.

        A step of up to `MAX_TOKENS` rows is computed by kernels for as many pieces as its experts have as a rule, and
        one of the base alone by the base's own layers. Kernels of larger steps are the same for any number of experts.
        """
        slots = self._tables.slots
        found = []
        for size in reversed(self.sizes):
            counts = {0, *(min(size, count) for count in expert_counts(slots))} if size <= MAX_TOKENS else {slots}
            found += [(size, count) for count in sorted(counts, reverse=True)]
        return found

    @property
    def least_experts(self) -> int:
        """Steps are computed as if they had so many at least, so that each graph can be proven with two."""
        return self._step.tokens.least_experts

    @least_experts.setter
    def least_experts(self, count: int) -> None:
        for side in self._step.sides:
            side.least_experts = count

    def _experts_of_graph(self, size: int) -> int:
        """Of the step that was filled."""
        return self._tables.slots if size > MAX_TOKENS else min(size, self._step.tokens.experts)

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
        into(self._kept, torch.tensor([*kept, *[0] * more], dtype=torch.int64))

    def capture(self, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Record all graphs. In the thread that computes, with nothing else in it.

        Args:
            told: how many are done, of how many.

        Raises:
            Exception: whatever keeps the model from being recorded.
        """
        found: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        graphs = self.graphs
        for done, (size, experts) in enumerate(graphs):
            told(done, len(graphs))
            self._places.fill([0] * size, [Piece(1, 0, [self._spare])] * size)
            # every row an expert's: the steps that are replayed have at most so many pieces
            slots = [row % experts if experts else BASE_SLOT for row in range(size)]
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
            found[size, experts] = graph, logits
        torch.cuda.synchronize(self._device)
        for side in self._step.sides:
            side.fill([])
        self._captured = found
        segments = torch.cuda.memory.memory_snapshot()
        own = (part["total_size"] for part in segments if part.get("segment_pool_id") == pool)
        self.nbytes = self._tables.nbytes + sum(own)

    def _forward(self, rows: int) -> Tensor:
        """The logits: [rows, vocabulary], or [texts, vocabulary] of the rows in `_kept`.

        The fused kernel takes all rows of a step, so only larger steps are cut, where the model can.
        """
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

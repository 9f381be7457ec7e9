"""Attention of a step over static buffers, which a CUDA graph reads again in every replay.

Each row is a text of its own: a token sees the pages of its request up to itself, so tokens of a prompt and the next
tokens of answers are one kind of row. On a GPU it is FlexAttention over the pages; a block of its mask is a page. Its
Triton kernel is made by torch when it is first called, which is before graphs are captured. Elsewhere the same buffers
are read by plain torch, the reference.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from meswitch.engine.attention import KVCache, Piece
from meswitch.engine.pages import PAGE, pages_for
from meswitch.errors import IncompatibleError

_PLAIN = {"scaling", "dropout", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache"}
_SPLITS = 4  # programs that share one row's keys: long texts of few requests keep the card busy
_QUERY_BLOCK = 128  # of a mask; a row's queries are one a head of the group, always fewer


@dataclass(frozen=True, slots=True)
class _Table:
    """The pages that each row sees in layers of one window.

    Args:
        window: tokens that are seen, None for all.
        numbers: [5, rows] int32: how many pages, the first page, the position in it from which on keys are seen, the
            last page, the number of keys that are seen in it.
        pages: [rows, pages] int32.
        host_pages: the same, page-locked for a GPU.
        filled: the pages that are known to stand there, by row; () where that is not kept.
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

    Raises:
        IncompatibleError: the model's attention is another.
    """

    def __init__(self, cache: KVCache, sizes: Sequence[int], longest: int, device: torch.device) -> None:
        if cache.function != "sdpa":
            raise IncompatibleError(f"its attention is {cache.function}, not scaled dot product")
        self._cache, self._sizes, self._rows, self._device = cache, tuple(sizes), sizes[-1], device
        self._is_flex = device.type == "cuda"
        self._inputs = torch.zeros(3, self._rows, dtype=torch.int64, device=device)
        self.ids, self.positions, self.writes = self._inputs
        self._writes_nowhere = cache.spare * PAGE
        pages = pages_for(longest)
        self._tables = {window: self._table(window, pages) for window in dict.fromkeys(cache.windows)}
        self._masks: dict[tuple[int | None, int, int], BlockMask] = {}

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
        self._copy(self._inputs, torch.tensor(inputs))
        for table in self._tables.values():
            self._copy(table.numbers, table.fill(pieces))

    def _copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source.pin_memory() if self._is_flex else source, non_blocking=True)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """As `StepPlaces.attend`.

        Raises:
            IncompatibleError: the layer wants more than scaled dot products.
        """
        for name, option in options.items():
            if name not in _PLAIN and option is not None:
                raise IncompatibleError(f"{type(module).__name__}: its attention is given {name}")
        if options.get("dropout"):
            raise IncompatibleError(f"{type(module).__name__}: dropout while it answers")
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
                block_mask=self._mask(table, size, groups, len(keys)),
                scale=scale,
                kernel_options={"SPLIT_KV": _SPLITS},
            )[:rows]
        else:
            attended = reference(grouped, keys, values, table.numbers[:, :rows], table.pages[:rows], scale)
        return attended.reshape(1, rows, query.shape[1], value.shape[3]), None

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
    query: Tensor, keys: Tensor, values: Tensor, numbers: Tensor, pages: Tensor, scale: float | None
) -> Tensor:
    """What FlexAttention computes of these buffers: [rows, heads, queries, width] of query's dtype.

    Args:
        query: [rows, heads, queries, width]. keys: [places, heads, width]. values: [places, heads, width].
        numbers: see `_Table`. pages: [rows, pages] int32.
    """
    count, _, since, last, until = numbers.long()
    most = int(count.max())
    number = torch.arange(most * PAGE, device=query.device)
    # what is beyond a text's pages is masked, but a number that is none would get through the mask
    own = torch.where(torch.arange(most, device=query.device) < count[:, None], pages[:, :most].long(), last[:, None])
    places = own[..., None] * PAGE + torch.arange(PAGE, device=query.device)
    ends = (count - 1) * PAGE + until
    mask = (number >= since[:, None]) & (number < ends[:, None])
    mine, theirs = (t[places.flatten(1)].transpose(1, 2) for t in (keys, values))
    return nn.functional.scaled_dot_product_attention(query, mine, theirs, mask[:, None, None], scale=scale)


@functools.cache
def _flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)

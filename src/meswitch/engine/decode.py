"""Attention of a step in which every request has one token, over static buffers that a CUDA graph reads again.

On a GPU it is FlexAttention over the pages; a block of its mask is a page. Its Triton kernel is made by torch when it
is first called, which is before graphs are captured. Elsewhere the same buffers are read by plain torch, the reference.
"""

import functools
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
_SPLITS = 4  # programs that share one request's keys: long texts of few requests keep the card busy
_QUERY_BLOCK = 128  # of a mask; a request's queries are one a head of the group, always fewer


@dataclass(frozen=True, slots=True)
class _Table:
    """The pages that each request sees in layers of one window.

    Args:
        window: tokens that are seen, None for all.
        numbers: [5, rows] int32: how many pages, the first page, the position in it from which on keys are seen, the
            last page, the number of keys that are seen in it.
        pages: [rows, pages] int32.
        host_pages: the same, page-locked for a GPU.
    """

    window: int | None
    numbers: Tensor
    pages: Tensor
    host_pages: Tensor
    filled: list[tuple[int, ...]]

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Which keys of a page a request sees, as FlexAttention asks."""
        _, first, since, last, until = self.numbers.unbind(0)

        def sees(request: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            page, place = key // PAGE, key % PAGE
            begun = (page != first[request]) | (place >= since[request])
            return begun & ((page != last[request]) | (place < until[request]))

        return sees

    def fill(self, pieces: Sequence[Piece]) -> Tensor:
        """Lay a step out; gives the numbers, on the host."""
        numbers: list[tuple[int, ...]] = []
        filled, self.filled[:] = list(self.filled), [()] * len(self.filled)  # if something fails, nothing is known
        changed = False
        for row, piece in enumerate(pieces):
            end = piece.past + 1
            start = 0 if self.window is None else max(0, end - self.window)
            seen = piece.pages[start // PAGE : pages_for(end)]
            numbers.append((len(seen), seen[0], start % PAGE, seen[-1], (end - 1) % PAGE + 1))
            if filled[row] != (known := tuple(seen)):
                filled[row] = known
                self.host_pages[row, : len(seen)] = torch.tensor(seen, dtype=torch.int32)
                changed = True
        if changed:
            self.pages.copy_(self.host_pages, non_blocking=True)
        found = torch.zeros(self.numbers.shape, dtype=torch.int32)
        found[:, : len(pieces)] = torch.tensor(numbers, dtype=torch.int32).T
        self.filled[:] = filled
        return found


class DecodePlaces:
    """Where the rows of a step are, in static buffers.

    Args:
        cache: of keys and values, with a page to spare.
        rows: of the largest step.
        longest: tokens of the longest text.

    Raises:
        IncompatibleError: the model's attention is another.
    """

    def __init__(self, cache: KVCache, rows: int, longest: int, device: torch.device) -> None:
        if cache.function != "sdpa":
            raise IncompatibleError(f"its attention is {cache.function}, not scaled dot product")
        self._cache, self._rows, self._device = cache, rows, device
        self._is_flex = device.type == "cuda"
        self.ids, self.positions, self.writes = self._inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._writes_nowhere = cache.spare * PAGE
        pages = pages_for(longest)
        self._tables = {window: self._table(window, pages) for window in dict.fromkeys(cache.windows)}
        self._masks: dict[tuple[int | None, int], BlockMask] = {}

    def _table(self, window: int | None, pages: int) -> _Table:
        host = torch.zeros(self._rows, pages, dtype=torch.int32, pin_memory=self._is_flex)
        numbers = torch.zeros(5, self._rows, dtype=torch.int32, device=self._device)
        return _Table(window, numbers, host.to(self._device, copy=True), host, [()] * self._rows)

    def fill(self, ids: Sequence[int], pieces: Sequence[Piece]) -> None:
        """Lay a step out: [rows] token ids, and where each is. Rows after these write to a page of nobody."""
        positions = [piece.past for piece in pieces]
        writes = [piece.pages[piece.past // PAGE] * PAGE + piece.past % PAGE for piece in pieces]
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
            whole = grouped.new_zeros(self._rows, *grouped.shape[1:])  # one kernel for steps of all sizes
            whole[:rows] = grouped
            attended = _flex()(
                whole,
                *(t[None].transpose(1, 2) for t in (keys, values)),
                block_mask=self._mask(table, groups, len(keys)),
                scale=scale,
                kernel_options={"SPLIT_KV": _SPLITS},
            )[:rows]
        else:
            attended = reference(grouped, keys, values, table.numbers[:, :rows], table.pages[:rows], scale)
        return attended.reshape(1, rows, query.shape[1], value.shape[3]), None

    def _mask(self, table: _Table, queries: int, places: int) -> BlockMask:
        """One for all layers of a window, over the table's buffers."""
        key = table.window, queries
        if key not in self._masks:
            none = torch.zeros(self._rows, 1, places // PAGE, 1, dtype=torch.int32, device=self._device)
            self._masks[key] = BlockMask(
                seq_lengths=(queries, places),
                kv_num_blocks=table.numbers[0][:, None, None],
                kv_indices=table.pages[:, None, None],
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
    """What FlexAttention computes of these buffers: [requests, heads, queries, width] of query's dtype.

    Args:
        query: [requests, heads, queries, width]. keys: [places, heads, width]. values: [places, heads, width].
        numbers: see `_Table`. pages: [requests, pages] int32.
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

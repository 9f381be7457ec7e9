"""The paged KV cache: who uses which pages, which of them a text finds again, and attention of a mixed step over it.

transformers calls one function for the attention of every layer (its attention interface). Ours writes the step's keys
and values into the cache, gathers each request's own, and lets the model's own function (scaled dot product or eager)
compute each request apart from all others: neither padding nor another request's numbers can reach it.

A full page of the cache is known by a key: a SHA-256 chain over the owner's name and all tokens up to the page's end.
The owner is an expert in one version, or the base, so a page is never found by another expert's text. A page that
nobody uses keeps its contents until its place is needed; the one that was given back first goes first.
"""

import contextlib
import hashlib
import sys
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from meswitch.errors import CapacityError, IncompatibleError, MeswitchError

NAME = "meswitch_paged"
PAGE = 64  # tokens
_running = threading.local()
# What a layer may hand to its attention beside queries, keys and values: numbers, and tensors of its own weights. Any
# other tensor has a value a token, and the step's tokens are not one text. Positions are for flash kernels alone.
_OWN_TENSORS, NOT_NEEDED = {"s_aux", "sinks"}, {"position_ids", "cache_position"}


def pages_for(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


def page_keys(owner: str, tokens: Sequence[int], known: Sequence[bytes] = ()) -> Iterator[bytes]:
    """The key of each full page of a text that is not among those that are known.

    Args:
        owner: whose keys and values these are: an expert and its version, or the base.
        tokens: ids of the whole text.
        known: keys of its first pages.
    """
    last = known[-1] if known else hashlib.sha256(owner.encode()).digest()
    for start in range(len(known) * PAGE, len(tokens) - PAGE + 1, PAGE):
        last = hashlib.sha256(last + array("q", tokens[start : start + PAGE]).tobytes()).digest()
        yield last


class Pages:
    """The pages of one cache.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._users = [0] * count
        self._empty = deque(range(count))
        self._kept: OrderedDict[int, None] = OrderedDict()  # without a user, first given back first
        self._key: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """How many can be taken."""
        return len(self._empty) + len(self._kept)

    def take(self) -> int:
        """A page for one user; what it holds is forgotten.

        Raises:
            CapacityError: none is left.
        """
        if self._empty:
            page = self._empty.popleft()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            del self._page[self._key.pop(page)]
        else:
            raise CapacityError("no page of the KV cache is free")
        self._users[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page of this key for one more user, None if there is none."""
        page = self._page.get(key)
        if page is not None:
            self._users[page] += 1
            self._kept.pop(page, None)
        return page

    def know(self, page: int, key: bytes) -> None:
        """Say what a full page holds, unless it or another page is known for that."""
        if key not in self._page and page not in self._key:
            self._page[key] = page
            self._key[page] = key

    def give_back(self, pages: Sequence[int], *, forget: bool = False) -> list[int]:
        """One user's pages, in the order of the text. The end of a text is overwritten before its beginning.

        Args:
            forget: what they hold is not to be found any more.

        Returns:
            those that nobody uses now and nobody can find.
        """
        left = []
        for page in reversed(pages):
            self._users[page] -= 1
            if forget and page in self._key:
                del self._page[self._key.pop(page)]
            if not self._users[page]:
                if page in self._key:
                    self._kept[page] = None
                else:
                    left.append(page)
                    self._empty.append(page)
        return left


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one request in a step.

    Args:
        length: how many.
        past: tokens of the request that are in the cache already.
        pages: its pages, in the order of the text.
    """

    length: int
    past: int
    pages: Sequence[int]


class KVCache:
    """Keys and values of all layers, by place: page x `PAGE` + position in the page.

    Args:
        config: of the text model.
        pages: how many; there is one more, `spare`, whose numbers nobody reads.
        function: of the model's own attention: `sdpa` or `eager`.

    Raises:
        IncompatibleError: a layer of a kind that this does not compute.
    """

    def __init__(self, config: Any, pages: int, function: str, device: torch.device) -> None:
        self._places, self._device, self.function = (pages + 1) * PAGE, device, function
        self.spare = pages
        self.windows = _windows(config)
        self._layers: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for _, keys, values in self._layers.values())

    @property
    def missing(self) -> list[int]:
        """Layers whose attention was not called yet."""
        return [number for number in range(len(self.windows)) if number not in self._layers]

    def layer(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[int | None, Tensor, Tensor]:
        """Its window, and all its keys and values: [places, heads, width].

        Args:
            key: [1, heads, tokens, width], of the step. value: likewise.
        """
        number = getattr(module, "layer_idx", None)
        if not isinstance(number, int) or not 0 <= number < len(self.windows):
            raise MeswitchError(f"{type(module).__name__}: which layer it is is not known (layer_idx: {number!r})")
        if number not in self._layers:
            keys, values = (
                torch.zeros(self._places, t.shape[1], t.shape[3], dtype=t.dtype, device=self._device)
                for t in (key, value)
            )
            self._layers[number] = module, keys, values
        owner, keys, values = self._layers[number]
        if owner is not module:
            raise MeswitchError(f"{type(module).__name__}: layer {number} has two attention modules")
        return self.windows[number], keys, values

    def clear(self, pages: Sequence[int]) -> None:
        """Write zeros over what is not finite: even where a mask hides it, zero times NaN is NaN."""
        if pages:
            places = _places(torch.tensor(pages), self._device)
            for _, keys, values in self._layers.values():
                keys[places] = 0
                values[places] = 0

    def own(self, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
        """The attention that the model has without us."""
        if self.function == "sdpa":
            return cast(Callable[..., tuple[Tensor, Any]], ALL_ATTENTION_FUNCTIONS["sdpa"])
        return cast(Callable[..., tuple[Tensor, Any]], sys.modules[type(module).__module__].eager_attention_forward)

    def allowed(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask as the model's attention takes it. mask: bool, true where a key may be seen."""
        if self.function == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


class Places(Protocol):
    """Where the tokens of a step are."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]: ...


class StepPlaces:
    """Where the tokens of one step are, and what each may see. Requests of one token come first.

    Args:
        pieces: in the step's order.
    """

    def __init__(self, cache: KVCache, pieces: Sequence[Piece], device: torch.device) -> None:
        self._cache, self._device = cache, device
        self.tokens = sum(piece.length for piece in pieces)
        self._singles = 0
        for piece in pieces:
            if piece.length > 1:
                break
            self._singles += 1
        self._masks: dict[int | None, Tensor | None] = {}
        written: list[Tensor] = []
        if self._singles:
            first = pieces[: self._singles]
            ends = [piece.past + 1 for piece in first]
            self._ends = torch.tensor(ends, device=device)
            self._fewest, self._seen = min(ends), max(ends)
            longest = max(len(piece.pages) for piece in first)
            table = torch.tensor([[*piece.pages, *[piece.pages[-1]] * (longest - len(piece.pages))] for piece in first])
            self._reads = _places(table, device)[:, : self._seen]
            written.append(self._reads.gather(1, (self._ends - 1)[:, None]).view(-1))
        self._long: list[_Long] = []
        start = self._singles
        for piece in pieces[self._singles :]:
            places = _places(torch.tensor(piece.pages), device)[: piece.past + piece.length]
            written.append(places[piece.past :])
            self._long.append(_Long(start, piece.length, piece.past, places))
            start += piece.length
        self._writes = torch.cat(written)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """Compute one layer's attention.

        Args:
            query: [1, heads, tokens, width]. key: [1, key heads, tokens, width]. value: [1, key heads, tokens, width].

        Returns:
            [1, tokens, heads, value width], and no weights.
        """
        if query.shape[:1] != (1,) or query.shape[2] != self.tokens or key.shape[2] != self.tokens:
            raise MeswitchError(f"{type(module).__name__}: {tuple(query.shape)} for a step of {self.tokens} tokens")
        options = {name: option for name, option in options.items() if name not in NOT_NEEDED}
        for name, option in options.items():
            if isinstance(option, Tensor) and name not in _OWN_TENSORS:
                raise MeswitchError(f"{type(module).__name__}: its attention is given {name}, which a step cannot have")
        window, keys, values = self._cache.layer(module, key, value)
        keys[self._writes], values[self._writes] = key[0].transpose(0, 1), value[0].transpose(0, 1)
        own = self._cache.own(module)
        found = []
        if self._singles:
            queries = query[0, :, : self._singles].transpose(0, 1)[:, :, None]
            theirs = (whole[self._reads].transpose(1, 2) for whole in (keys, values))
            out, _ = own(module, queries, *theirs, self._single_mask(window, query.dtype), **options)
            found.append(out[:, 0])
        for long in self._long:
            queries = query[:, :, long.start : long.start + long.length]
            if not long.past:  # all that it sees is here
                here = (t[:, :, long.start : long.start + long.length] for t in (key, value))
            else:
                here = (whole[long.places].transpose(0, 1)[None] for whole in (keys, values))
            out, _ = own(module, queries, *here, self._long_mask(long, window, query.dtype), **options)
            found.append(out[0])
        return (found[0] if len(found) == 1 else torch.cat(found))[None], None

    def _single_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[requests, 1, 1, keys], None if every request sees all of them."""
        if window not in self._masks:
            if self._fewest == self._seen and (window is None or window >= self._seen):
                self._masks[window] = None
            else:
                at = torch.arange(self._seen, device=self._device)
                mask = at < self._ends[:, None]
                if window is not None:
                    mask &= at >= self._ends[:, None] - window
                self._masks[window] = self._cache.allowed(mask[:, None, None], dtype)
        return self._masks[window]

    def _long_mask(self, long: "_Long", window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[1, 1, tokens, keys]; None lets scaled dot product attention be causal by itself."""
        is_plain = not long.past and (window is None or long.length <= window)
        if is_plain and self._cache.function == "sdpa":
            return None
        if window not in long.masks:
            at = torch.arange(long.past + long.length, device=self._device)
            rows = at[long.past :, None]
            mask = at <= rows
            if window is not None:
                mask &= at > rows - window
            long.masks[window] = self._cache.allowed(mask[None, None], dtype)
        return long.masks[window]


@dataclass(slots=True)
class _Long:
    """A piece of several tokens: where it starts in the step, and the places of its whole text so far."""

    start: int
    length: int
    past: int
    places: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)


def _places(pages: Tensor, device: torch.device) -> Tensor:
    """[..., pages] -> [..., pages x PAGE]: the places of pages."""
    places = pages[..., None] * PAGE + torch.arange(PAGE)
    return places.flatten(-2).to(device, non_blocking=True)


def _windows(config: Any) -> list[int | None]:
    """How many of the last tokens each layer sees; None for all.

    Raises:
        IncompatibleError: a layer is of another kind.
    """
    window = getattr(config, "sliding_window", None)
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * count
    others = sorted(set(kinds[:count]) - {"full_attention", "sliding_attention"})
    if others:
        raise IncompatibleError(f"layer_types: {', '.join(others)}: the running batch has no such layers")
    if window is None and "sliding_attention" in kinds[:count]:
        raise IncompatibleError("sliding_window: is not there, and layer_types names sliding_attention")
    return [window if kind == "sliding_attention" else None for kind in kinds[:count]]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: Places | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls."""
    paged = paged or getattr(_running, "step", None)  # some models do not hand on what they are given
    if paged is None:
        raise MeswitchError(f"{type(module).__name__}: is called outside of a step")
    if attention_mask is not None:
        raise MeswitchError(f"{type(module).__name__}: makes a mask of its own, which a step cannot have")
    return paged.attend(module, query, key, value, options)


@contextlib.contextmanager
def running(step: Places) -> Iterator[None]:
    """The step that this thread computes, for attention that is not told of it."""
    _running.step = step
    try:
        yield
    finally:
        _running.step = None


AttentionInterface.register(NAME, _attend)

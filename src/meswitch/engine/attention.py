"""Attention of the running batch on a CPU: each request over its own keys, as many at once as are of like length.

transformers gives a step's queries and keys as one long row, with a mask of all queries against all keys that hides one
request's from another's. With 32 requests 31 of 32 products are then thrown away, and the mask alone takes (tokens of a
step) x (tokens of the cache) numbers. Its interface for other attentions says where each request's rows are instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from meswitch.errors import MeswitchError

BY_REQUEST = "meswitch_by_request"


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests that attend at once.

    Args:
        queries: rows of the step, [requests x length of queries] int64 or a slice.
        keys: the same of the keys, each request's padded to the longest with its own first.
        requests: how many. width: keys of each.
        mask: [requests, 1, queries, width] bool, what each query sees; None for all, or for what `causal` says.
        causal: as many queries as keys, each of which sees those before it.
    """

    queries: Tensor | slice
    keys: Tensor | slice
    requests: int
    width: int
    mask: Tensor | None
    causal: bool


class Spans:
    """Where the requests of a step have their queries and keys.

    Args:
        queries: bounds of each request's rows, from 0 on. keys: those of its keys, of which the last are its queries'.
        window: keys that a query sees at most, None for all before it.
    """

    def __init__(self, queries: Sequence[int], keys: Sequence[int], window: int | None = None) -> None:
        self.groups: list[_Group] = []
        self.alone = len(queries) == 2
        """Whether one request has all rows and keys."""
        single: list[tuple[int, int, int]] = []
        for number in range(len(queries) - 1):
            start, end = queries[number : number + 2]
            first, last = keys[number : number + 2]
            if end - start == 1:
                single.append((start, first, last))
            elif end > start:
                self.groups.append(_several(start, end, first, last, window))
        single.sort(key=lambda request: request[1] - request[2])
        while single:  # at most as many keys again are padding
            _, first, last = single[0]
            alike = [request for request in single if 2 * (request[2] - request[1]) >= last - first]
            del single[: len(alike)]
            alike.sort()
            self.groups.append(_singles(alike, rows=queries[-1], of=keys[-1]))

    def read(self, index: Tensor) -> Tensor:
        """Read the keys of each group side by side, so that the attention need not gather them again.

        Args:
            index: [keys] int64, where each key lies in the cache.

        Returns:
            [keys, those of padding too] int64.
        """
        if all(isinstance(group.keys, slice) for group in self.groups):
            return index
        parts, start = [], 0
        for place, group in enumerate(self.groups):
            parts.append(index[group.keys])
            self.groups[place] = replace(group, keys=slice(start, start + len(parts[-1])))
            start += len(parts[-1])
        return torch.cat(parts)


def _several(start: int, end: int, first: int, last: int, window: int | None) -> _Group:
    """One request with several queries."""
    length, width = end - start, last - first
    within = width if window is None else window
    if length == width <= within:
        return _Group(slice(start, end), slice(first, last), 1, width, None, True)
    places = torch.arange(width - length, width)[:, None] - torch.arange(width)
    mask = (places >= 0) & (places < within)
    return _Group(slice(start, end), slice(first, last), 1, width, mask[None, None], False)


def _singles(requests: Sequence[tuple[int, int, int]], rows: int, of: int) -> _Group:
    """Requests with one query each: (row, first key, after the last key). All their keys are seen.

    Args:
        rows: of the step. of: keys of the step.
    """
    lengths = torch.tensor([last - first for _, first, last in requests])
    width = int(lengths.max())
    queries = slice(None) if len(requests) == rows else torch.tensor([row for row, *_ in requests])
    if int(lengths.min()) == width and width * len(requests) == of:
        return _Group(queries, slice(None), len(requests), width, None, False)
    places = torch.arange(width)
    seen = places < lengths[:, None]
    keys = torch.tensor([first for _, first, _ in requests])[:, None] + places * seen
    return _Group(queries, keys.view(-1), len(requests), width, seen[:, None, None], False)


def say(lengths: Tensor, spans: Spans) -> None:
    """Let the attention find the spans of a step.

    Args:
        lengths: the step's `cu_seq_lens_k`, which transformers hands to the attention of each layer.
    """
    lengths.spans = spans  # type: ignore[attr-defined]


def attention_by_request(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers calls an attention; outside the running batch the one that it computes with torch's own.

    Args:
        query: [1, heads, rows, width]. key, value: [1, heads, keys, width].

    Returns:
        [1, rows, heads, width], and no weights.
    """
    lengths = kwargs.get("cu_seq_lens_k")
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    spans = getattr(lengths, "spans", None)
    if spans is None or attention_mask is not None or kwargs.get("position_bias") is not None:
        raise MeswitchError(f"{type(module).__name__}: attends in a way that is not known")
    kwargs.pop("is_causal", None)
    if spans.alone:
        (group,) = spans.groups
        return sdpa_attention_forward(module, query, key, value, group.mask, is_causal=group.causal, **kwargs)
    found: Tensor | None = None
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [rows or keys, heads, width]
    for group in spans.groups:
        own = flat[0][group.queries]
        parts = (
            own.view(group.requests, -1, *own.shape[1:]),
            *(tensor[group.keys].view(group.requests, group.width, *tensor.shape[1:]) for tensor in flat[1:]),
        )
        q, k, v = (part.transpose(1, 2) for part in parts)
        out, _ = sdpa_attention_forward(module, q, k, v, group.mask, is_causal=group.causal, **kwargs)
        rows = out.flatten(0, 1)  # [rows, heads, width]
        if isinstance(group.queries, slice) and group.queries == slice(None):
            return rows[None], None
        if found is None:
            found = rows.new_zeros(query.shape[2], *rows.shape[1:])
        found[group.queries] = rows
    assert found is not None
    return found[None], None


AttentionInterface.register(BY_REQUEST, attention_by_request)
AttentionMaskInterface.register(BY_REQUEST, sdpa_mask)

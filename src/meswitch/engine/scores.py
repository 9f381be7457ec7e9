"""What is done with a step's scores: penalties, masks, draws, log probabilities. On any device, without waiting for it.

Rows are computed alike alone and among others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IN_PROMPT = 1 << 30
"""A bit of a history, above the number of times that a token was made."""
_HEAD = 1024  # likeliest tokens of a row that are looked at first on a CPU
_AT_ONCE = 512  # rows whose log probabilities are computed at once


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def ints(values: Sequence[Any], device: torch.device) -> Tensor:
    return moved(torch.tensor(values, dtype=torch.int64), device)


def floats(values: Sequence[Any], device: torch.device) -> Tensor:
    return moved(torch.tensor(values, dtype=torch.float64), device)


def penalise(scores: Tensor, history: Tensor, rows: Tensor, penalties: Sequence[Tensor]) -> None:
    """Change the scores of tokens that were there.

    Args:
        scores: [rows, vocabulary] float32, changed in place.
        history: [penalised rows, vocabulary] int32: how often each token was made, and `IN_PROMPT`.
        rows: [penalised rows] which these are.
        penalties: repetition, presence and frequency, each [penalised rows].
    """
    repetition, presence, frequency = (column[:, None] for column in penalties)
    x = scores[rows]
    x = torch.where(history > 0, torch.where(x > 0, x / repetition, x * repetition), x)
    made = history & (IN_PROMPT - 1)
    scores.index_copy_(0, rows, x - frequency * made - presence * (made > 0))


def allow(scores: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Leave the tokens whose bits are set.

    Args:
        scores: [rows, vocabulary] float32, changed in place.
        rows: [some] which are limited.
        bits: [some, vocabulary / 32, rounded up] int32, lowest bit first.
    """
    size = scores.shape[1]
    allowed = (bits[:, :, None] >> torch.arange(32, dtype=torch.int32, device=scores.device)) & 1
    kept = scores[rows].masked_fill(allowed.flatten(1)[:, :size] == 0, -torch.inf)
    scores.index_copy_(0, rows, kept)


def draw(
    scores: Tensor, uniform: Tensor, temperature: Tensor, limits: tuple[Tensor, Tensor] | None, min_p: Tensor | None
) -> Tensor:
    """[rows] tokens at random.

    The token is found where the summed probabilities, in the order of the vocabulary, reach the random number. So it is
    the same whether or not the scores are sorted for some other row.

    Args:
        scores: [rows, vocabulary] float32.
        uniform: [rows] float64, 0 to 1.
        temperature: [rows]; what comes of rows with 0 is not used.
        limits: top_k and top_p, each [rows]; None where no row has any.
        min_p: [rows]; None where no row has one.
    """
    temperature = torch.where(temperature > 0, temperature, 1.0).float()[:, None]
    x = (scores - scores.amax(-1, keepdim=True)) / temperature
    if min_p is not None:
        x = x.masked_fill(x < min_p.log().float()[:, None], -torch.inf)  # of the likeliest, whose x is 0
    if limits is not None:
        x = _cut(x, limits[0][:, None], limits[1][:, None])
    shares = x.softmax(-1).cumsum(-1, dtype=torch.float64)
    whole = shares[:, -1:]
    wanted = torch.minimum(uniform[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(shares, wanted, right=True)[:, 0].clamp(max=x.shape[1] - 1)


def _cut(x: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Leave the likeliest tokens of each row: so many, and of these such a share; the others become -inf.

    On a CPU, sorting a large vocabulary takes ten times as long as finding its head, which is enough for most rows.
    Which way a row goes depends on it alone.

    Args:
        x: [rows, vocabulary] float32, the largest of a row 0.
        top_k: [rows, 1], at least 1.
        top_p: [rows, 1].
    """
    if x.device.type != "cpu" or x.shape[1] <= 2 * _HEAD:
        ranked, order = x.sort(dim=-1, descending=True, stable=True)
        return torch.full_like(x, -torch.inf).scatter(1, order, _limited(ranked, top_k, top_p, None)[0])
    bits = x.contiguous().view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32  # in the order of the numbers that they are the bits of
    places = torch.arange(x.shape[1] - 1, -1, -1)  # of equals the first comes first
    order = x.shape[1] - 1 - ((keys + places).topk(_HEAD).values & 0xFFFFFFFF)
    ranked, ends = _limited(x.gather(1, order), top_k, top_p, x.double().exp().sum(-1, keepdim=True))
    cut = torch.full_like(x, -torch.inf).scatter(1, order, ranked)
    rest = (~ends).nonzero()[:, 0]
    if len(rest):
        ranked, order = x[rest].sort(dim=-1, descending=True, stable=True)
        ranked = _limited(ranked, top_k[rest], top_p[rest], None)[0]
        cut[rest] = torch.full_like(ranked, -torch.inf).scatter(1, order, ranked)
    return cut


def _limited(ranked: Tensor, top_k: Tensor, top_p: Tensor, whole: Tensor | None) -> tuple[Tensor, Tensor]:
    """Leave the first of each row, and say whether that is all that is to be left.

    Args:
        ranked: [rows, places] descending.
        top_k: see `_cut`. top_p: the same.
        whole: [rows, 1] float64, what the weights of the whole vocabulary sum to; None if it is all in `ranked`.

    Returns:
        [rows, places], and [rows]: whether no token after these places is left.
    """
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    weights = ranked.double().exp().masked_fill(rank >= top_k, 0.0)
    inside = top_k <= ranked.shape[1]
    total = weights.sum(-1, keepdim=True)
    total = total if whole is None else torch.where(inside, total, whole)
    reached, wanted = weights.cumsum(-1), top_p * total
    kept = (reached - weights < wanted) | (rank == 0) | (top_p >= 1)  # the token that crosses top_p stays
    kept &= rank < top_k
    # what part of the vocabulary a larger top_k leaves is not known here
    ends = inside | ((reached[:, -1:] >= wanted) & (top_p < 1) & (top_k >= 1 << 31))
    return ranked.masked_fill(~kept, -torch.inf), ends[:, 0]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's log probability, and (token, log probability) of the likeliest in its place, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log probabilities on a device: [rows] of the tokens, [rows, top] of the likeliest, and which these are."""

    logprobs: Tensor
    top: Tensor
    top_tokens: Tensor

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, top: int) -> "TokenScores":
        """logits: [rows, vocabulary]. tokens: [rows]."""
        found = logits.float().log_softmax(-1)
        values, ids = found.topk(min(top, found.shape[1]), -1)
        return cls(found.gather(1, tokens[:, None])[:, 0], values, ids)

    def read(self, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
        """Wait for the device. counts: how many of the likeliest each row wants."""
        rows = zip(tokens, self.logprobs.tolist(), self.top_tokens.tolist(), self.top.tolist(), counts, strict=True)
        return [
            TokenLogprobs(token, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
            for token, logprob, ids, values, count in rows
        ]


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log probabilities of given tokens. Waits for the device.

    Args:
        logits: [rows, vocabulary].
        tokens: one for each row.
        top: how many of the likeliest to name beside each.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(tokens), _AT_ONCE):
        some = list(tokens[start : start + _AT_ONCE])
        scores = TokenScores.of(logits[start : start + _AT_ONCE], ints(some, logits.device), top)
        found += scores.read(some, [top] * len(some))
    return found

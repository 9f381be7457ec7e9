"""Sampling from a whole model in batches whose finished rows leave, so that nobody computes padding to the end."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PERIOD, WINDOW = 16, 48  # a text whose last so many tokens repeat what is at most so many tokens long has no end
_PRUNE_EVERY = 8  # steps between looks for rows to take out

# whether a row has come to its end, from its new tokens so far
Ended = Callable[[list[int]], bool]


class Sampler:
    """A causal LM and one stream of random numbers: the same calls in the same order give the same tokens."""

    def __init__(self, model: Any, pad: int, seed: int) -> None:
        self.model, self.pad, self.device = model, pad, model.device
        self.random = torch.Generator(device=self.device).manual_seed(seed)
        accepted = inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.positions = "position_ids" in accepted
        self.cache = "cache" if "cache" in accepted else "past_key_values"  # renamed within the supported versions

    @torch.inference_mode()
    def sample(self, heads: list[list[int]], most: int, ends: set[int], ended: Ended | None = None) -> list[list[int]]:
        """What follows each head at temperature 1: up to and with a token of `ends`, or until `ended`, a repetition or
        `most` new tokens.

        Args:
            heads: token ids, each of at least one token.
        """
        tails: list[list[int]] = [[] for _ in heads]
        width = max(map(len, heads), default=0)
        ids = self._tensor([[self.pad] * (width - len(head)) + head for head in heads])
        mask = self._tensor([[0] * (width - len(head)) + [1] * len(head) for head in heads])
        rows = list(range(len(heads)))  # which row of the batch continues which head
        running = [most > 0] * len(heads)
        cache: Any = None
        step = 0
        while any(running[row] for row in rows):
            if step % _PRUNE_EVERY == 0 and not all(running[row] for row in rows):
                alive = [i for i, row in enumerate(rows) if running[row]]
                if cache is None or hasattr(cache, "batch_select_indices"):
                    index = self._tensor(alive)
                    if cache is not None:
                        cache.batch_select_indices(index)
                    ids, mask, rows = ids[index], mask[index], [rows[i] for i in alive]
            logits, cache = self._step(ids, mask, cache)
            ids = torch.multinomial(logits.float().softmax(-1), 1, generator=self.random)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            step += 1
            for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
                if running[row]:
                    tail = tails[row]
                    tail.append(token)
                    looping = len(tail) % PERIOD == 0 and repeats(tail)
                    running[row] = not (
                        token in ends or len(tail) == most or looping or (ended is not None and ended(tail))
                    )
        return tails

    def _step(self, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits of the token after the last one, [rows, vocabulary], and the cache."""
        arguments: dict[str, Any] = self.last_only | {self.cache: cache}
        if self.positions:  # padding is on the left and does not count
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **arguments)
        return out.logits[:, -1], getattr(out, self.cache)

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def repeats(ids: list[int]) -> bool:
    """Whether the end of a text is one short piece over and over."""
    window = ids[-WINDOW:]
    return any(
        window == ids[-WINDOW - period : -period] for period in range(1, PERIOD + 1) if len(ids) >= WINDOW + period
    )

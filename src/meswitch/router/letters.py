"""A causal LM that answers by one letter: queries -> logits of the options, in one forward pass."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.router.prompt import Prompt, Question

_CPU_BATCH_TOKENS = 1024
_GPU_BATCH_TOKENS = 16384
_KEPT_PREFIXES = 32


class LetterModel:
    """See the module's docstring.

    Args:
        model: a transformers causal LM in eval mode; float32 on the CPU.
    """

    def __init__(self, model: Any, prompt: Prompt) -> None:
        self.model = model
        self.prompt = prompt
        accepted = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in accepted
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache = "cache" if "cache" in accepted else "past_key_values"  # renamed during transformers 5
        self._prefixes: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @torch.inference_mode()
    def answer(self, queries: Sequence[Sequence[int]], options: Sequence[str]) -> Tensor:
        """[len(queries), len(options)] float32 on the CPU: the letters' logits. queries: token ids of each."""
        question = self.prompt.question(options)
        out = torch.zeros(len(queries), len(options))
        limit = _CPU_BATCH_TOKENS if self.model.device.type == "cpu" else _GPU_BATCH_TOKENS
        order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
        for batch in _batches(order, [len(query) + len(question.after) for query in queries], limit):
            cache = _copied(self._prefix(question.before))
            if len(batch) > 1:
                cache.batch_repeat_interleave(len(batch))
            prefixes = [len(question.before)] * len(batch)
            logits = self._logits([queries[i] for i in batch], question, prefixes, cache)
            out[batch] = logits[:, : len(options)].cpu()
        return out

    def forward(self, asked: Sequence[tuple[Sequence[Sequence[int]], Sequence[str]]]) -> list[Tensor]:
        """As `answer` for several (queries, options) in one batch: on the model's device, with gradients if enabled."""
        questions = [self.prompt.question(options) for _, options in asked]
        rows = [i for i, (queries, _) in enumerate(asked) for _ in queries]
        cache = self._read([question.before for question in questions])
        cache.batch_select_indices(torch.tensor(rows, device=self.model.device))
        queries = [query for queries, _ in asked for query in queries]
        logits = self._logits(queries, questions[0], [len(questions[i].before) for i in rows], cache)
        parts = logits.split([len(queries) for queries, _ in asked])
        return [part[:, : len(options)] for part, (_, options) in zip(parts, asked, strict=True)]

    def forget(self) -> None:
        """Drop kept keys and values; call it when the weights have changed."""
        self._prefixes.clear()

    def _prefix(self, before: tuple[int, ...]) -> Any:
        """Keys and values of the question up to the query, computed once an order of the options."""
        if before not in self._prefixes:
            self._prefixes[before] = self._read([before])
            if len(self._prefixes) > _KEPT_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(before)
        return self._prefixes[before]

    def _read(self, befores: Sequence[tuple[int, ...]]) -> Any:
        """Keys and values of some questions up to the query, padded on the right."""
        lengths = torch.tensor([len(before) for before in befores], device=self.model.device)
        width = int(lengths.max())
        ids = torch.tensor([[*before, *[0] * (width - len(before))] for before in befores], device=self.model.device)
        mask = (torch.arange(width, device=self.model.device) < lengths[:, None]).long()
        out = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **self._keep)
        cache = getattr(out, "cache", None) or getattr(out, "past_key_values", None)
        if cache is None:
            raise ConfigError(f"model: {type(self.model).__name__} keeps no keys and values; use a transformer")
        return cache

    def _logits(self, queries: Sequence[Sequence[int]], question: Question, prefixes: list[int], cache: Any) -> Tensor:
        """[n, letters] float32. prefixes: the length of each row's question in `cache`, which is padded to the longest.

        Padding lies between a row's question and its query, so the letter comes after the last position of all rows.
        """
        device, prefix = self.model.device, max(prefixes)
        lengths = torch.tensor(prefixes, device=device)[:, None]
        rows = [[*query, *question.after] for query in queries]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        pads = torch.tensor([width - len(row) for row in rows], device=device)[:, None]
        place = torch.arange(width, device=device)
        mask = torch.cat([torch.arange(prefix, device=device) < lengths, place >= pads], 1).long()
        where = {"position_ids": lengths + (place - pads).clamp_min(0)} if self._positions else {}
        given = {self._cache: cache, **where, **self._keep}
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **given).logits
        picked: Tensor = logits[:, -1, torch.tensor(self.prompt.letter_ids, device=device)].float()
        return picked


def _copied(cache: Any) -> Any:
    """A cache that can be written to without changing this one.

    Layers of plain keys and values replace their tensors when they grow, so those need not be copied: on a GPU that is
    two launches a layer less. Others (recurrent states) may be written to in place.
    """
    from transformers.cache_utils import DynamicLayer

    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return copy.deepcopy(cache)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def _batches(order: list[int], lengths: list[int], limit: int) -> Iterator[list[int]]:
    """Runs of `order` (ascending lengths) that hold at most `limit` tokens with their padding."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch

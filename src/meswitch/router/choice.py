"""A causal LM that answers a multiple-choice question by one letter: queries -> logits of the options, in one pass.

There is one lettered option an expert, and "none of these". The options come before the query, so everything up to the
query is the same for all queries of a batch and its keys and values are computed once. The query is tokenised apart
from the rest, with the tokenizer's special tokens taken as plain text: a user cannot end the question and write
another."""

import copy
import inspect
import logging
import string
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.router.base import clip

LETTERS = string.ascii_uppercase + string.ascii_lowercase
NONE_OF_THESE = "None of these."
_MARK, _OPTIONS = "\x1fquery\x1f", "\x1foptions\x1f"  # places in the text; no text that a person types has them
_ARROW = " ="
_QUESTION = "Which option is the request below for? Answer with its letter."
logger = logging.getLogger("meswitch.router")
WIDTHS = (32, 64, 128, 256)  # tokens after the prefix; a row is padded to the next of these
# Graphs share memory and write to fixed places, so one is captured or replayed at a time.
_LOCK = threading.Lock()
_CPU_BATCH_TOKENS = 1024
_GPU_BATCH_TOKENS = 16384
_KEPT_PREFIXES = 32
_ALONE = 4  # queries up to which a GPU is quicker at replaying a graph for each than at one batch without a graph


@dataclass(frozen=True, slots=True)
class TokenisedQuestion:
    """A tokenised question with a gap for the query: `before` + query + `after`, then the letter."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class ChoicePrompt:
    """Writes the question for one tokenizer, in the model's chat template where it has one.

    Args:
        max_tokens: of a query; of a longer one three quarters from its beginning and one quarter from its end.

    Raises:
        ConfigError: the tokenizer has no single token for a letter, so no one logit stands for an option.
    """

    def __init__(self, tokenizer: Any, max_tokens: int = 192) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self._before, self._after = self._text()
        self.letter_ids = self._letter_ids()
        self._written = lru_cache(256)(self._write)  # to tokenise the options anew takes longer than the query

    def question(self, options: Sequence[str]) -> TokenisedQuestion:
        """The question with these options, in this order; A is the first.

        Raises:
            ConfigError: more options than letters.
        """
        if not 1 < len(options) <= len(self.letter_ids):
            raise ConfigError(f"options: {len(options)}; a question has 2 to {len(self.letter_ids)} lettered options")
        return self._written(tuple(options))

    def _write(self, options: tuple[str, ...]) -> TokenisedQuestion:
        head, _, tail = self._before.partition(_OPTIONS)
        ids = self._ids(head)
        for letter, option in zip(self.letter_ids, options, strict=False):
            ids += [*self._ids(one_line(option) + _ARROW), letter, *self._ids("\n")]
        return TokenisedQuestion((*ids, *self._ids(tail)), tuple(self._ids(self._after)))

    def query(self, text: str) -> list[int]:
        """A query's tokens."""
        ids: list[int] = self.tokenizer(clip(text), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) > self.max_tokens:
            head = self.max_tokens * 3 // 4
            ids = ids[:head] + ids[head - self.max_tokens :]
        return ids

    def _text(self) -> tuple[str, str]:
        """Everything before the query, with a mark where the options go, and everything after it."""
        content = f"{_QUESTION}\n{_OPTIONS}\nRequest: {_MARK}"
        if not self.chat:
            start = getattr(self.tokenizer, "bos_token", None) or ""
            before, after = content.split(_MARK)
            return start + before, f"{after}\n\nAnswer:"
        asked = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, mark, after = asked.partition(_MARK)
        if not mark or _MARK in after or before.count(_OPTIONS) != 1:
            raise ConfigError("chat_template: does not show the user's message exactly once; use another model")
        return before, after

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _letter_ids(self) -> tuple[int, ...]:
        """The token of each letter as it comes right after the question.

        Whether that is "A" or " A" is the tokenizer's choice, so both are tried in their place. Lower-case letters are
        optional: they only raise the number of options.
        """
        after = self._after
        place = self._ids(after)
        for space in ("", " ") if self.chat else (" ", ""):
            found: list[int] = []
            for letter in LETTERS:
                ids = self._ids(after + space + letter)
                if len(ids) != len(place) + 1 or ids[:-1] != place or ids[-1] in found:
                    break
                found.append(ids[-1])
            if len(found) >= len(string.ascii_uppercase):
                return tuple(found)
        raise ConfigError(
            "tokenizer: an option's letter after the question is not one token of its own; use another model"
        )


def one_line(text: str) -> str:
    """A description as one line without the final stop, so that options look alike."""
    return " ".join(text.split()).rstrip(".") + "."


# CUDA graphs for questions that are asked one at a time.
#
# A small model's forward pass on a GPU is a thousand launches, each shorter than it takes Python to ask for it.
# Captured once, all of them are one call.


class PrefixGraphs:
    """What follows one kept prefix, as one graph a width, each captured when it is first needed.

    Args:
        run: (ids [1, width] int64, pads [1, 1] int64) -> [1, letters] float32, with `pads` tokens of padding on the
            left. All on `device`: a graph can neither copy from the host nor read anything back.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> None:
        self._run = run
        self._device = device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool: Any = None
        self._refused = False

    def __call__(self, row: Sequence[int]) -> Tensor | None:
        """[letters] float32 on the CPU. None: the row is wider than any graph, or this model cannot be captured."""
        width = next((width for width in WIDTHS if width >= len(row)), None)
        if width is None or self._refused:
            return None
        pads = width - len(row)
        with _LOCK, torch.cuda.device(self._device):
            if width not in self._graphs:
                self._capture(width)
            if self._refused:
                return None
            graph, given, logits = self._graphs[width]
            given.copy_(torch.tensor([[pads, *[0] * pads, *row]]))
            graph.replay()
            return logits[0].cpu()

    def _capture(self, width: int) -> None:
        given = torch.zeros(1, 1 + width, dtype=torch.int64, device=self._device)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries set themselves up in their first calls, which cannot be captured
                    self._run(given[:, 1:], given[:, :1])
            torch.cuda.current_stream().wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread, such as an engine's, may allocate meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._run(given[:, 1:], given[:, :1])
            self._graphs[width] = graph, given, logits
        except RuntimeError as error:  # out of memory, say
            logger.warning("router: this model cannot be captured as a CUDA graph (%s); queries take longer", error)
            self._refused = True


@dataclass(frozen=True, slots=True)
class _Prefix:
    """Keys and values of a question up to the query; on a GPU also the graphs that go on from there."""

    cache: Any
    graphs: PrefixGraphs | None


class ChoiceModel:
    """See the module's docstring.

    Args:
        model: a transformers causal LM in eval mode; float32 on the CPU.
    """

    def __init__(self, model: Any, prompt: ChoicePrompt) -> None:
        self.model = model
        self.prompt = prompt
        accepted = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in accepted
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache = "cache" if "cache" in accepted else "past_key_values"  # renamed during transformers 5
        self.graphs = model.device.type == "cuda"  # ask single queries by CUDA graphs; False does not
        self._letters = torch.tensor(prompt.letter_ids, device=model.device)
        self._prefixes: OrderedDict[tuple[int, ...], _Prefix] = OrderedDict()

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @torch.inference_mode()
    def answer(self, queries: Sequence[Sequence[int]], options: Sequence[str]) -> Tensor:
        """[len(queries), len(options)] float32 on the CPU: the letters' logits. queries: token ids of each."""
        question = self.prompt.question(options)
        prefix = self._prefix(question.before)
        out = torch.zeros(len(queries), len(options))
        limit = _CPU_BATCH_TOKENS if self.model.device.type == "cpu" else _GPU_BATCH_TOKENS
        order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
        if self.graphs and prefix.graphs is not None and len(queries) <= _ALONE:
            left = []
            for i in order:
                found = prefix.graphs([*queries[i], *question.after])
                if found is None:
                    left.append(i)
                else:
                    out[i] = found[: len(options)]
            order = left
        for batch in _batches(order, [len(query) + len(question.after) for query in queries], limit):
            cache = _copied(prefix.cache)
            if len(batch) > 1:
                cache.batch_repeat_interleave(len(batch))
            prefixes = [len(question.before)] * len(batch)
            logits = self._logits([queries[i] for i in batch], question, prefixes, cache)
            out[batch] = logits[:, : len(options)].cpu()
        return out

    def forward(
        self, asked: Sequence[tuple[Sequence[Sequence[int]], Sequence[str]]], *, whole: bool | None = None
    ) -> list[Tensor]:
        """As `answer` for several (queries, options) in one batch: on the model's device, with gradients if enabled.

        Args:
            whole: read every query together with its question, in one pass, instead of each question once and then the
                queries. More arithmetic, half the launches; by default on a GPU, where a small model waits for the
                latter.
        """
        questions = [self.prompt.question(options) for _, options in asked]
        rows = [i for i, (queries, _) in enumerate(asked) for _ in queries]
        queries = [query for queries, _ in asked for query in queries]
        if self.model.device.type != "cpu" if whole is None else whole:
            logits = self._whole(queries, [questions[i] for i in rows])
        else:
            cache = self._read([question.before for question in questions])
            cache.batch_select_indices(torch.tensor(rows, device=self.model.device))
            logits = self._logits(queries, questions[0], [len(questions[i].before) for i in rows], cache)
        parts = logits.split([len(queries) for queries, _ in asked])
        return [part[:, : len(options)] for part, (_, options) in zip(parts, asked, strict=True)]

    def forget(self) -> None:
        """Drop kept keys and values; call it when the weights have changed."""
        self._prefixes.clear()

    def _prefix(self, before: tuple[int, ...]) -> _Prefix:
        """Keys and values of the question up to the query, computed once an order of the options."""
        if before not in self._prefixes:
            cache = self._read([before])
            graphs = None
            # what transformers says of compilation holds here too: nothing depends on data, nothing is read back
            if self.graphs and _is_plain(cache) and getattr(self.model, "_can_compile_fullgraph", False):
                graphs = PrefixGraphs(self._following(len(before), cache), self.model.device)
            self._prefixes[before] = _Prefix(cache, graphs)
            if len(self._prefixes) > _KEPT_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(before)
        return self._prefixes[before]

    def _following(self, prefix: int, cache: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """`_after` for one question of `prefix` tokens, whose cache stays as it is."""
        lengths = torch.tensor([[prefix]], device=self.model.device)
        return lambda ids, pads: self._after(ids, pads, lengths=lengths, prefix=prefix, cache=_copied(cache))

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

    def _logits(
        self, queries: Sequence[Sequence[int]], question: TokenisedQuestion, prefixes: list[int], cache: Any
    ) -> Tensor:
        """[n, letters] float32. prefixes: the length of each row's question in `cache`, which is padded to the longest.

        Padding lies between a row's question and its query, so the letter comes after the last position of all rows.
        """
        device = self.model.device
        rows = [[*query, *question.after] for query in queries]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        pads = torch.tensor([[width - len(row)] for row in rows], device=device)
        lengths = torch.tensor(prefixes, device=device)[:, None]
        return self._after(ids, pads, lengths=lengths, prefix=max(prefixes), cache=cache)

    def _after(self, ids: Tensor, pads: Tensor, *, lengths: Tensor, prefix: int, cache: Any) -> Tensor:
        """[n, letters] float32. Nothing is copied from the host here and nothing read back: a graph can hold it.

        Args:
            ids: [n, width] int64, the first `pads` [n, 1] of them padding.
            lengths: [n, 1], of each row's question in `cache`, which is padded to `prefix`.
        """
        place = torch.arange(ids.shape[1], device=ids.device)
        kept = torch.arange(prefix, device=ids.device) < lengths
        mask = torch.cat([kept, place >= pads], 1).long()
        where = {"position_ids": lengths + (place - pads).clamp_min(0)} if self._positions else {}
        given = {self._cache: cache, **where, **self._keep}
        return self._picked(self.model(input_ids=ids, attention_mask=mask, use_cache=True, **given).logits)

    def _whole(self, queries: Sequence[Sequence[int]], questions: Sequence[TokenisedQuestion]) -> Tensor:
        """[n, letters] float32: each query with its own question. Padding lies between the two, as in `_logits`."""
        device = self.model.device
        tails = [[*query, *question.after] for query, question in zip(queries, questions, strict=True)]
        befores = [list(question.before) for question in questions]
        width = max(len(before) + len(tail) for before, tail in zip(befores, tails, strict=True))
        gaps = [width - len(before) - len(tail) for before, tail in zip(befores, tails, strict=True)]
        rows = [before + [0] * gap + tail for before, gap, tail in zip(befores, gaps, tails, strict=True)]
        start, gap = (torch.tensor(x, device=device)[:, None] for x in ([len(before) for before in befores], gaps))
        place = torch.arange(width, device=device)
        mask = ((place < start) | (place >= start + gap)).long()
        positions = torch.where(place < start, place, (place - gap).maximum(start))
        where = {"position_ids": positions} if self._positions else {}
        ids = torch.tensor(rows, device=device)
        return self._picked(
            self.model(input_ids=ids, attention_mask=mask, use_cache=False, **where, **self._keep).logits
        )

    def _picked(self, logits: Tensor) -> Tensor:
        """[n, letters] float32, of logits [n, positions, vocabulary] after the last position."""
        return logits[:, -1, self._letters].float()


def _copied(cache: Any) -> Any:
    """A cache that can be written to without changing this one.

    Layers of plain keys and values replace their tensors when they grow, so those need not be copied: on a GPU that is
    two launches a layer less. Others (recurrent states) may be written to in place.
    """
    if not _is_plain(cache):
        return copy.deepcopy(cache)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def _is_plain(cache: Any) -> bool:
    from transformers.cache_utils import DynamicLayer

    return all(isinstance(layer, DynamicLayer) for layer in cache.layers)


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

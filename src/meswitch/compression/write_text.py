"""Calibration text that the expert writes itself: no data set is needed, and it is what the expert was tuned to say.

A chat model that is shown only the opening of a user's turn invents a question (Magpie, arXiv 2406.08464), and then
answers it; a model without a chat template writes from its beginning-of-sequence token (LLM-QAT, arXiv 2305.17888).
Question and answer are two runs, because only the template knows what stands between them. The whole expert is in
memory while it writes, unlike in the rest of compression.
"""

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch.artifact import fingerprint
from meswitch.artifact.manifest import Calibration
from meswitch.artifact.writer import NOWHERE, SavedWork, digest
from meswitch.checkpoint import Checkpoint, cache_bytes
from meswitch.compression.partial_model import working_dtype
from meswitch.compression.text import (
    MAX_LENGTH,
    SELF,
    CalibrationSet,
    Messages,
    load_questions,
    open_tokenizer,
)
from meswitch.cpu import fitting_threads
from meswitch.errors import ConfigError
from meswitch.loaded import LazyModel
from meswitch.tokenizer import ChatTokenizer
from meswitch.units import Progress, format_bytes, silent

QUESTION, ANSWER = 96, 160  # tokens at most that the expert invents of each
LENGTH = QUESTION + ANSWER  # of a sequence, unless a file asks a longer question
BATCH, CACHE_BYTES = 256, 4 << 30  # sequences at a time at most, and what their keys and values may take
# On a CPU: sequences x weights, so that a batch, which is what an interrupt may lose, takes a minute or so; at least 8.
CPU_BATCH_WORK = 1.2e10
DRY = 0.1  # a batch of which less than this is of use is the last one
_MARK = "QUESTION-GOES-HERE"
PERIOD, WINDOW = 16, 48  # a text whose last so many tokens repeat what is at most so many tokens long has no end
_PRUNE_EVERY = 8  # steps between looks for rows to take out

# whether a row has come to its end, from its new tokens so far
Ended = Callable[[list[int]], bool]


def self_calibration(
    expert: Checkpoint,
    tokens: int,
    *,
    prompts: str | Path | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
    notice: Callable[[str], None] | None = None,
    work: SavedWork = NOWHERE,
) -> CalibrationSet:
    """Let the expert write its own calibration text, sampled at temperature 1.

    The same arguments give the same text, with the same versions of torch and transformers on the same hardware.

    Args:
        tokens: sequences of at most 256 tokens are written until they hold this many.
        prompts: a file of questions that it answers (`calibration.load_questions`), again and again until there are
            enough tokens or nothing new comes; None lets it invent them.
        device: where the whole expert is loaded, in float32 on the CPU and bfloat16 elsewhere.
        notice: is told about memory before, and about what was dropped after.
        work: where what was written is saved after every batch, and found again.

    Raises:
        ConfigError: there is no tokenizer, the prompts cannot be read, or the expert writes nothing of use.
    """
    say = notice or (lambda line: None)
    device = torch.device(device)
    tokenizer = open_tokenizer(expert.directory)
    asked = None if prompts is None else load_questions(Path(prompts))
    dtype = working_dtype(device, expert.parameters)
    size = format_bytes(expert.parameters * dtype.itemsize)
    kept: list[list[int]] = []
    dropped: Counter[str] = Counter()
    asked_for, dry = 0, False
    plan = digest(fingerprint(expert), tokens, asked, device.type, seed)
    if (saved := work.load("text", plan)) is not None:
        kept, faults, asked_for, dry = saved[0]
        dropped = Counter(faults)
    seen = set(map(tuple, kept))
    total = sum(map(len, kept))
    if total < tokens and not dry:
        say(f"calibration: the full expert is loaded on {device} ({size}) to write its own text")
        writer = _Writer(expert, tokenizer, device, dtype, seed)
        writer.sampler.told = lambda step: progress(
            "writing calibration text", total, tokens, f"{len(kept)} sequences, the next ones at token {step}"
        )
        if saved is not None:
            writer.sampler.random.set_state(saved[1]["random"])
    with fitting_threads(device, expert.config.get_text_config().hidden_size):
        while total < tokens and not dry:
            mean = total / len(kept) if kept else 64
            wanted = min(writer.batch, max(8, round(1.1 * (tokens - total) / mean)))
            batch = [asked[(asked_for + i) % len(asked)] for i in range(wanted)] if asked else wanted
            asked_for, useless = asked_for + wanted, 0
            for sequence, fault in writer.write(batch):
                fault = fault or ("a copy" if tuple(sequence) in seen else None)
                if fault:
                    dropped[fault] += 1
                    useless += 1
                elif total < tokens:
                    seen.add(tuple(sequence))
                    kept.append(sequence[: tokens - total])
                    total += len(kept[-1])
            dry = wanted - useless < DRY * wanted
            work.save("text", plan, (kept, dropped, asked_for, dry), {"random": writer.sampler.random.get_state()})
            progress("writing calibration text", total, tokens, f"{len(kept)} sequences")
    if not kept:
        raise ConfigError(
            f"calibration: {SELF}: {expert.directory} wrote only text that is {_list(dropped)}; give a file of text"
        )
    losses = f"; dropped {_list(dropped)}" if dropped else ""
    less = f" of {tokens} wanted" if total < tokens else ""
    say(f"calibration: it wrote {len(kept)} sequences, {total} tokens{less}{losses}")
    source = SELF if prompts is None else f"{SELF}:{Path(prompts).name}"
    sha256 = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    return CalibrationSet(kept, Calibration(source, sha256, len(kept), total, seed))


def _list(dropped: Counter[str]) -> str:
    return ", ".join(f"{fault} ({count})" for fault, count in sorted(dropped.items()))


class _Writer:
    """The expert with its tokenizer, ready to write batches of sequences."""

    def __init__(
        self, expert: Checkpoint, tokenizer: ChatTokenizer, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        self.tokenizer = tokenizer
        self.ends = set(tokenizer.ends)
        starts = (tokenizer.tokenizer.bos_token_id, *tokenizer.ends)
        self.start: int = next((i for i in starts if i is not None), 0)
        model = LazyModel.of(expert, device, dtype).load()
        self.sampler = TextSampler(model, self.start, seed, longest=tokenizer.max_length)
        self.batch = max(1, min(BATCH, CACHE_BYTES // max(1, cache_bytes(expert.config, dtype) * MAX_LENGTH)))
        if device.type == "cpu":
            self.batch = min(self.batch, max(8, int(CPU_BATCH_WORK / expert.parameters)))
        self.chat = tokenizer.has_template
        if self.chat:
            opening, _, closing = tokenizer.render([{"role": "user", "content": _MARK}]).partition(_MARK)
            self.opening = self._ids(opening.rstrip(" "))
            # what ends a user's turn: a token of its own, or text such as `[/INST]`
            self.closing = closing.strip().split("\n")[0]
            added = tokenizer.tokenizer.added_tokens_decoder
            self.turn_ends = {i for i in self._ids(closing.strip())[:1] if i in added}

    def write(self, batch: int | list[Messages]) -> Iterator[tuple[list[int], str | None]]:
        """So many sequences of its own, or answers to these conversations: each with what is wrong with it."""
        most = ANSWER
        longest = min(LENGTH if isinstance(batch, int) else MAX_LENGTH, self.tokenizer.max_length)
        if isinstance(batch, int) and not self.chat:
            most = LENGTH
            heads = [[self.start]] * batch
        elif isinstance(batch, int):
            heads = [self._ids(self._render(turn)) if turn else [] for turn in self._invent(batch)]
        elif self.chat:
            heads = [self._ids(self._render(conversation)) for conversation in batch]
        else:
            heads = [self.tokenizer.encode(conversation[-1]["content"]) for conversation in batch]
        usable = [0 < len(head) < longest for head in heads]
        tails = iter(
            self.sampler.sample([head for head, use in zip(heads, usable, strict=True) if use], most, self.ends)
        )
        for head, use in zip(heads, usable, strict=True):
            tail = next(tails) if use else []
            fault = None if use or not head else "too long a question"
            fault = fault or ("empty" if not set(tail) - self.ends else "endless repetition" if repeats(tail) else None)
            yield (head + tail)[:longest], fault

    def _invent(self, count: int) -> Iterator[Messages | None]:
        """Questions, None where there is nothing in it."""
        mark = "" if self.turn_ends else self.closing

        def ended(tail: list[int]) -> bool:
            return mark in self.tokenizer.tokenizer.decode(tail[-len(mark) - 1 :])

        ends = self.ends | self.turn_ends
        for ids in self.sampler.sample([self.opening] * count, QUESTION, ends, ended if mark else None):
            text = self.tokenizer.decode(ids)
            text = (text.partition(mark)[0] if mark else text).strip()
            yield [{"role": "user", "content": text}] if text and not repeats(ids) else None

    def _render(self, conversation: Messages) -> str:
        try:
            return self.tokenizer.render(conversation)
        except ConfigError as error:
            raise ConfigError(f"calibration: {SELF}: {error}") from error

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.tokenizer(text, add_special_tokens=False).input_ids)


class TextSampler:
    """A causal LM and one stream of random numbers: the same calls in the same order give the same tokens.

    Args:
        longest: tokens of a text that the model takes.
    """

    def __init__(self, model: Any, pad: int, seed: int, longest: int = 1 << 20) -> None:
        self.longest = longest
        self.told: Callable[[int], None] = lambda step: None  # is given the number of new tokens, every few of them
        self.model, self.pad, self.device = model, pad, model.device
        self.random = torch.Generator(device=self.device).manual_seed(seed)
        accepted = inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.positions = "position_ids" in accepted
        self.cache = "cache" if "cache" in accepted else "past_key_values"  # renamed within the supported versions

    @torch.inference_mode()
    def sample(self, heads: list[list[int]], most: int, ends: set[int], ended: Ended | None = None) -> list[list[int]]:
        """What follows each head at temperature 1: up to and with a token of `ends`, or until `ended`, a repetition or
        `most` new tokens, or as many as the model takes.

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
        while any(running[row] for row in rows) and width + step < self.longest:
            if step % _PRUNE_EVERY == 0:
                self.told(step)
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

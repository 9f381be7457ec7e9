"""Calibration text: token sequences that look like the expert's work, read from a file or written by the expert."""

import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meswitch.artifact.fingerprint import sha256_file
from meswitch.artifact.manifest import Calibration
from meswitch.checkpoint import Checkpoint
from meswitch.compression.saved_work import NOWHERE, SavedWork
from meswitch.errors import ConfigError
from meswitch.progress import Progress, silent

MAX_LENGTH = 512
_ROWS = 256  # tokenised at once
SELF = "self"


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token id sequences and where they came from.

    starts: in each sequence, the position of the first token that the assistant says in its last turn; 0 where there
    are no turns. Empty: 0 in all.
    """

    sequences: list[list[int]]
    info: Calibration
    starts: list[int] = field(default_factory=list)

    @property
    def known_starts(self) -> list[int]:
        """`starts`, one for each sequence."""
        return self.starts or [0] * len(self.sequences)

    def first(self, tokens: int) -> list[list[int]]:
        """The first sequences, as far as they hold at most so many tokens; at least one."""
        ends = list(itertools.accumulate(map(len, self.sequences)))
        return self.sequences[: max(1, bisect.bisect_right(ends, tokens))]


@dataclass(frozen=True, slots=True)
class Source:
    """Where calibration text comes from.

    `FILE` is text. `self` is text that the expert writes, `self:FILE` are its answers to the file's questions, and
    `FILE+self` is a file's text, filled up to the number of tokens by the expert. (`./self` is a file of that name.)
    """

    text: Path | None = None
    questions: Path | None = None
    own: bool = False  # the expert writes

    @classmethod
    def parse(cls, value: str | Path) -> "Source":
        """Raises: ConfigError: a file's name is missing."""
        if isinstance(value, Path):
            return cls(text=value)
        if value == SELF:
            return cls(own=True)
        if value.startswith(f"{SELF}:"):
            return cls(questions=_named(value.removeprefix(f"{SELF}:"), value), own=True)
        if value.endswith(f"+{SELF}"):
            return cls(text=_named(value.removesuffix(f"+{SELF}"), value), own=True)
        return cls(text=_named(value, value))

    def resolved(self, resolve: Callable[[str], Path]) -> "Source":
        """The same with its file put in place, as `family.toml` does with relative paths."""
        text, questions = (None if file is None else resolve(str(file)) for file in (self.text, self.questions))
        return Source(text, questions, self.own)


def _named(file: str, value: str) -> Path:
    if not file:
        raise ConfigError(f"calibration: {value!r} names no file; give FILE, self, self:FILE or FILE+self")
    return Path(file)


def gather(
    source: str | Path | Source,
    expert: Checkpoint,
    max_tokens: int,
    *,
    device: torch.device,
    progress: Progress = silent,
    notice: Callable[[str], None] | None = None,
    work: SavedWork = NOWHERE,
) -> CalibrationSet:
    """The text that a source names, at most `max_tokens` of it.

    Raises:
        ConfigError: see `load_calibration` and `self_calibration`.
    """
    from meswitch.compression.write_text import self_calibration

    source = source if isinstance(source, Source) else Source.parse(source)
    read = None if source.text is None else load_calibration(source.text, expert.directory, max_tokens)
    if not source.own:
        assert read is not None
        return read
    missing = max_tokens - (0 if read is None else read.info.tokens)
    if read is not None and missing <= 0:
        if notice is not None:
            notice(f"calibration: {source.text} has {read.info.tokens} tokens already; the expert writes none")
        return read
    own = self_calibration(
        expert, missing, prompts=source.questions, device=device, progress=progress, notice=notice, work=work
    )
    if read is None:
        return own
    joined = Calibration(
        f"{read.info.source}+{SELF}",
        hashlib.sha256(f"{read.info.sha256}+{own.info.sha256}".encode()).hexdigest(),
        read.info.sequences + own.info.sequences,
        read.info.tokens + own.info.tokens,
        own.info.seed,
    )
    return CalibrationSet(read.sequences + own.sequences, joined, read.known_starts + own.known_starts)


def load_calibration(file: str | Path, tokenizer_dir: str | Path, max_tokens: int = 524288) -> CalibrationSet:
    """Read calibration text and tokenise it with the expert's own tokenizer and chat template.

    Args:
        file: `.txt` (one sequence a line) or `.jsonl` (`{"text": ...}`, `{"messages": [...]}` or
            `{"prompt": ..., "completion": ...}` a line).
        max_tokens: sequences are taken in order until they hold this many tokens; each is cut at 512.

    Raises:
        ConfigError: no such file, a row that is none of these, no text at all, or no tokenizer.
    """
    file = Path(file)
    rows = _rows(file)
    tokenizer = load_tokenizer(tokenizer_dir)
    sequences: list[list[int]] = []
    starts: list[int] = []
    total = 0
    while total < max_tokens and (some := list(itertools.islice(rows, _ROWS))):
        found = [_text(row, tokenizer, file, number) for number, row in some]
        texts = _tokenised(tokenizer, [(text, is_chat) for text, is_chat, _ in found])
        asked = _tokenised(tokenizer, [(question, is_chat) for _, is_chat, question in found])
        for tokens, before in zip(texts, asked, strict=True):
            tokens = tokens[: min(MAX_LENGTH, max_tokens - total)]
            if tokens:
                sequences.append(tokens)
                starts.append(len(before))
                total += len(tokens)
    if not sequences:
        raise ConfigError(f"{file}: holds no text; calibration needs at least one sequence")
    return CalibrationSet(sequences, Calibration(file.name, sha256_file(file), len(sequences), total), starts)


def _tokenised(tokenizer: Any, texts: list[tuple[str, bool]]) -> list[list[int]]:
    """Token ids of texts, each with whether it has its special tokens already; none of an empty text."""
    found: list[list[int]] = [[] for _ in texts]
    for is_chat in (True, False):
        mine = [place for place, (text, chat) in enumerate(texts) if chat == is_chat and text]
        if mine:
            ids = tokenizer([texts[place][0] for place in mine], add_special_tokens=not is_chat).input_ids
            for place, tokens in zip(mine, ids, strict=True):
                found[place] = tokens
    return found


def load_questions(file: Path) -> list[list[dict[str, str]]]:
    """Conversations that wait for an answer.

    `.txt`: one question a line. `.jsonl`: `{"prompt": ...}` or `{"messages": [...]}` a line; what follows the last
    user message is left out.

    Raises:
        ConfigError: no such file, a row without a question, or no row at all.
    """
    found = []
    for number, row in _rows(file):
        messages: Any = None
        if isinstance(row, str):
            messages = [{"role": "user", "content": row}]
        elif isinstance(row, dict) and isinstance(row.get("prompt"), str):
            messages = [{"role": "user", "content": row["prompt"]}]
        elif isinstance(row, dict) and isinstance(row.get("messages"), list):
            messages = list(row["messages"])
            while messages and not (isinstance(messages[-1], dict) and messages[-1].get("role") == "user"):
                messages.pop()
        if not messages:
            raise ConfigError(f"{file}: line {number}: needs a question: `prompt`, or `messages` with a user's")
        found.append(messages)
    if not found:
        raise ConfigError(f"{file}: holds no questions; the expert needs at least one")
    return found


def load_tokenizer(directory: str | Path) -> Any:
    """The expert's own tokenizer.

    Raises:
        ConfigError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory}: no tokenizer that transformers can read, and calibration text needs one: put "
            "tokenizer.json and tokenizer_config.json there, or compress data-free (--calibration none)"
        ) from error


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and rows: a line of text, or the JSON value of a `.jsonl` line."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such calibration file; give a .txt or .jsonl file, or `none`")
    return _parsed(file)


def _parsed(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            yield number, line
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}: line {number}: not valid JSON: {error}") from None


def _text(row: Any, tokenizer: Any, file: Path, number: int) -> tuple[str, bool, str]:
    """The row's text, whether the chat template has set the special tokens already, and what of it is asked."""
    if isinstance(row, str) and file.suffix != ".jsonl":
        return row, False, ""
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            return text, True, _asked(row["messages"], text, tokenizer)
        if isinstance(row.get("prompt"), str):
            return row["prompt"] + str(row.get("completion", "")), False, row["prompt"]
        if isinstance(row.get("text"), str):
            return row["text"], False, ""
    raise ConfigError(f"{file}: line {number}: needs one of the fields `text`, `messages` or `prompt`")


def _asked(messages: list[Any], text: str, tokenizer: Any) -> str:
    """The conversation up to where the assistant's last turn begins; nothing if it has none."""
    if len(messages) < 2 or not isinstance(messages[-1], dict) or messages[-1].get("role") != "assistant":
        return ""
    question = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    return question if text.startswith(question) else ""

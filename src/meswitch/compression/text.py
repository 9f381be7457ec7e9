"""Calibration text: token sequences that look like the expert's work, read from a file or written by the expert."""

import bisect
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from meswitch.artifact.fingerprint import sha256_file
from meswitch.artifact.manifest import Calibration
from meswitch.checkpoint import Checkpoint
from meswitch.compression.conversations import Messages, Row, read_rows
from meswitch.compression.saved_work import NOWHERE, SavedWork
from meswitch.errors import ConfigError
from meswitch.progress import Progress, silent
from meswitch.tokenizer import ChatTokenizer, has_tokenizer

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

    def __str__(self) -> str:
        """As `parse` takes it; a file that is called like one of the words keeps a `./`."""
        if self.questions is not None:
            return f"{SELF}:{self.questions}"
        text = "" if self.text is None else str(self.text)
        text = f"./{text}" if text == SELF or text.startswith(f"{SELF}:") else text
        return f"{text}+{SELF}" if self.own and text else text or SELF

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
        file: see `conversations`.
        max_tokens: sequences are taken in order until they hold this many tokens; each is cut at 512, or at what the
            model takes.

    Raises:
        ConfigError: no such file, a row in none of the forms, no text at all, no tokenizer, or another model's.
    """
    file = Path(file)
    rows = read_rows(_existing(file))
    tokenizer = open_tokenizer(tokenizer_dir)
    sequences: list[list[int]] = []
    starts: list[int] = []
    total = 0
    while total < max_tokens and (some := list(itertools.islice(rows, _ROWS))):
        found = [_written(row, tokenizer, file) for row in some]
        texts = _tokenised(tokenizer, [(text, bool(row.messages)) for row, (text, _) in zip(some, found, strict=True)])
        asked = _tokenised(tokenizer, [(ask, bool(row.messages)) for row, (_, ask) in zip(some, found, strict=True)])
        for tokens, before in zip(texts, asked, strict=True):
            tokens = tokens[: min(MAX_LENGTH, tokenizer.max_length, max_tokens - total)]
            if tokens:
                _check_known(tokens, tokenizer, tokenizer_dir)
                sequences.append(tokens)
                starts.append(len(before))
                total += len(tokens)
    if not sequences:
        raise ConfigError(f"{file}: holds no text; calibration needs at least one sequence")
    return CalibrationSet(sequences, Calibration(file.name, sha256_file(file), len(sequences), total), starts)


def _tokenised(tokenizer: ChatTokenizer, texts: list[tuple[str, bool]]) -> list[list[int]]:
    """Token ids of texts, each with whether it has its special tokens already; none of an empty text."""
    found: list[list[int]] = [[] for _ in texts]
    for is_chat in (True, False):
        mine = [place for place, (text, chat) in enumerate(texts) if chat == is_chat and text]
        if mine:
            ids = tokenizer.tokenizer([texts[place][0] for place in mine], add_special_tokens=not is_chat).input_ids
            for place, tokens in zip(mine, ids, strict=True):
                found[place] = tokens
    return found


def _check_known(tokens: list[int], tokenizer: ChatTokenizer, directory: str | Path) -> None:
    largest = max(tokens)
    if largest >= tokenizer.vocab_size:
        text = tokenizer.tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            f"{directory}: its tokenizer gives token {largest} ({text!r}), and its model has {tokenizer.vocab_size} "
            "tokens; put the tokenizer files there that it was trained with"
        )


def load_questions(file: Path) -> list[Messages]:
    """Conversations that wait for an answer.

    Args:
        file: see `conversations`. A line of `.txt`, and a `prompt` that is a text, is a user's message. What follows
            the last user message is left out.

    Raises:
        ConfigError: no such file, a row without a question, or no row at all.
    """
    found = []
    for row in read_rows(_existing(file)):
        asked = row.text if row.is_prose else row.asked
        messages = row.messages or ([{"role": "user", "content": asked}] if asked else [])
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        if last < 0:
            raise ConfigError(f"{file}: {row.place}: needs a question: a `prompt`, or messages with a user's")
        found.append(messages[: last + 1])
    if not found:
        raise ConfigError(f"{file}: holds no questions; the expert needs at least one")
    return found


def open_tokenizer(directory: str | Path) -> ChatTokenizer:
    """The expert's own tokenizer.

    Raises:
        ConfigError: it has none, or none that can be used.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        raise ConfigError(
            f"{directory}: no tokenizer, and calibration text needs one: put tokenizer.json and tokenizer_config.json "
            "there, or compress data-free (--calibration none)"
        )
    return ChatTokenizer.open(directory.name, directory)


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ConfigError(f"{file}: no such calibration file; give a .txt, .jsonl or .json file, or `none`")
    return file


def _written(row: Row, tokenizer: ChatTokenizer, file: Path) -> tuple[str, str]:
    """A row's text, and the beginning of it up to where the assistant's last turn, or the completion, begins."""
    if not row.messages:
        return row.text, row.asked if row.asked != row.text else ""
    try:
        text = tokenizer.render(row.messages, answer=False)
        if len(row.messages) < 2 or row.messages[-1]["role"] != "assistant":
            return text, ""
        question = tokenizer.render(row.messages[:-1])
    except ConfigError as error:
        raise ConfigError(f"{file}: {row.place}: {error}") from error
    return text, question if text.startswith(question) else ""

"""Calibration text: token sequences that look like the expert's work, read from a file or written by the expert.

A `.txt` file holds one text a line. `.jsonl` holds a row a line, `.json` a list of rows; each may be gzipped. A row is

- `{"messages": [{"role": ..., "content": ...}, ...]}`,
- `{"conversations": [{"from": "human", "value": ...}, ...]}` (ShareGPT),
- `{"prompt": ..., "completion": ...}`, both texts or both lists of messages (TRL); the completion may be left out,
- `{"instruction": ..., "input": ..., "output": ...}` (Alpaca): a user's turn and the answer,
- `{"text": ...}`.

A conversation may have a `system` text beside its turns. Everything else is refused by line and field. Nothing is
guessed: no field is taken for another, and null is no text.

Text that the expert writes itself needs no data set, and is what the expert was tuned to say. A chat model that is
shown only the opening of a user's turn invents a question (Magpie, arXiv 2406.08464), and then answers it; a model
without a chat template writes from its beginning-of-sequence token (LLM-QAT, arXiv 2305.17888). Question and answer are
two runs, because only the template knows what stands between them. The whole expert is in memory while it writes,
unlike in the rest of compression.
"""

import bisect
import contextlib
import hashlib
import inspect
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch.artifact import fingerprint
from meswitch.artifact.manifest import Calibration
from meswitch.artifact.writer import NOWHERE, SavedWork, digest
from meswitch.checkpoint import Checkpoint, cache_bytes, sha256_file
from meswitch.compression.partial_model import working_dtype
from meswitch.cpu import fitting_threads
from meswitch.errors import ConfigError
from meswitch.jsonfile import json_kind, read_json_rows, read_lines
from meswitch.loaded import LazyModel
from meswitch.tokenizer import ChatTokenizer, has_tokenizer
from meswitch.units import Progress, format_bytes, plural, silent

Messages = list[dict[str, Any]]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_FORMS = ("messages", "conversations", "prompt", "instruction", "text")
# Fields of a row or a message that change what is said, and that no form here has.
_REFUSED = ("tools", "functions", "tool_calls", "function_call", "images", "image", "videos", "audio", "audios")
MAX_LENGTH = 512
_ROWS = 256  # tokenised at once
SELF = "self"

# of text that the expert writes
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


@dataclass(frozen=True, slots=True)
class CalibrationRow:
    """One row of a file. Either a conversation or a text.

    Args:
        place: where it is, for messages: `line 3`.
        messages: of a conversation; empty for a text.
        text: the whole text.
        asked: the beginning of the text that the expert answers; empty if nothing says so.
        is_prose: whether it is a line of a `.txt` file.
    """

    place: str
    messages: Messages
    text: str = ""
    asked: str = ""
    is_prose: bool = False


def read_calibration_rows(file: Path) -> Iterator[CalibrationRow]:
    """The rows of a calibration file, in order.

    Raises:
        ConfigError: the file cannot be read, or a row is in none of the forms. It names the line and the field.
    """
    kind = Path(file.name.removesuffix(".gz")).suffix.lower()
    if kind in (".jsonl", ".ndjson", ".json"):
        for place, value in read_json_rows(file):
            yield _row(value, place, f"{file}: {place}")
    elif kind in (".txt", ""):
        for number, line in read_lines(file):
            if number == 1:
                _check_text(line, file)
            yield CalibrationRow(f"line {number}", [], line, is_prose=True)
    else:
        raise ConfigError(f"{file}: calibration text is read from .txt, .jsonl and .json files (also .gz), not {kind}")


def _check_text(line: str, file: Path) -> None:
    """Refuse rows of JSON under the name of prose."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(line)
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            raise ConfigError(
                f"{file}: line 1: is JSON, and a .txt file is read as prose; name it .jsonl if each line is a row, "
                ".json if it is a list of rows"
            )


def _row(value: Any, place: str, where: str) -> CalibrationRow:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: is {json_kind(value)}; a row is an object with one of {', '.join(_FORMS)}")
    _refuse_extras(value, where, "")
    form = next((name for name in _FORMS if name in value), None)
    if form is None:
        found = ", ".join(value) or "none"
        raise ConfigError(f"{where}: needs one of the fields {', '.join(_FORMS)}; it has {found}")
    if form in ("messages", "conversations"):
        return CalibrationRow(place, _with_system(value, _messages(value, form, where), where))
    if form == "instruction":
        return CalibrationRow(place, _alpaca(value, where))
    if form == "prompt":
        return _prompt(value, place, where)
    return CalibrationRow(place, [], _text(value, form, where))


def _prompt(value: Mapping[str, Any], place: str, where: str) -> CalibrationRow:
    if "completion" not in value and "chosen" in value:
        raise ConfigError(f"{where}: chosen: is a preference pair; calibration takes one answer, as `completion`")
    if isinstance(value["prompt"], list):
        answer = _messages(value, "completion", where) if "completion" in value else []
        return CalibrationRow(place, _with_system(value, [*_messages(value, "prompt", where), *answer], where))
    if value.get("system"):
        raise ConfigError(f"{where}: system: a prompt that is a text has no system turn; write the row as `messages`")
    prompt = _text(value, "prompt", where)
    completion = _text(value, "completion", where) if "completion" in value else ""
    return CalibrationRow(place, [], prompt + completion, asked=prompt)


def _alpaca(value: Mapping[str, Any], where: str) -> Messages:
    """The user's turn is the instruction and, after an empty line, the input if there is one."""
    if value.get("history"):
        raise ConfigError(f"{where}: history: earlier turns are read from `messages` only; write the row so")
    parts = [_text(value, "instruction", where)]
    parts += [_text(value, "input", where)] if value.get("input") is not None else []
    user = {"role": "user", "content": "\n\n".join(part for part in parts if part)}
    return _with_system(value, [user, {"role": "assistant", "content": _text(value, "output", where)}], where)


def _with_system(value: Mapping[str, Any], turns: Messages, where: str) -> Messages:
    """The turns after the system text that stands beside them, if there is one."""
    text = _text(value, "system", where) if value.get("system") is not None else ""
    first = turns[0]
    if not text or (first["role"] == "system" and first["content"] == text):
        return turns
    if first["role"] == "system":
        raise ConfigError(f"{where}: system: the turns have another system text; leave one out")
    return [{"role": "system", "content": text}, *turns]


def _messages(value: Mapping[str, Any], field: str, where: str) -> Messages:
    turns = value[field]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else json_kind(turns)
        raise ConfigError(f"{where}: {field}: expected a list of messages, found {found}")
    return [_message(turn, f"{field}[{index}]", where) for index, turn in enumerate(turns)]


def _message(turn: Any, path: str, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ConfigError(f"{where}: {path}: expected a message, found {json_kind(turn)}")
    _refuse_extras(turn, where, f"{path}.")
    if "from" in turn and "role" not in turn:
        speaker = _text(turn, "from", where, f"{path}.")
        if speaker not in _ROLES:
            raise ConfigError(f"{where}: {path}.from: {speaker!r} is none of {', '.join(_ROLES)}")
        return {"role": _ROLES[speaker], "content": _text(turn, "value", where, f"{path}.")}
    role = _text(turn, "role", where, f"{path}.")
    return turn | {"role": role, "content": _content(turn, path, where)}


def _content(turn: Mapping[str, Any], path: str, where: str) -> str:
    """A text, or a list of text parts joined by line breaks."""
    parts = turn.get("content")
    if not isinstance(parts, list):
        return _text(turn, "content", where, f"{path}.")
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else json_kind(part)
        if kind != "text":
            raise ConfigError(f"{where}: {path}.content[{index}]: is {kind!r}; experts are calibrated on text only")
    return "\n".join(_text(part, "text", where, f"{path}.content[{i}].") for i, part in enumerate(parts))


def _text(value: Mapping[str, Any], field: str, where: str, prefix: str = "") -> str:
    found = value.get(field)
    if not isinstance(found, str):
        what = json_kind(found) if field in value else "no such field"
        raise ConfigError(f"{where}: {prefix}{field}: expected a text, found {what}")
    try:
        found.encode()
    except UnicodeEncodeError:
        reason = "holds half of a surrogate pair, which is no Unicode; take it out"
        raise ConfigError(f"{where}: {prefix}{field}: {reason}") from None
    return found


def _refuse_extras(value: Mapping[str, Any], where: str, prefix: str) -> None:
    for name in _REFUSED:
        if value.get(name):
            raise ConfigError(
                f"{where}: {prefix}{name}: is not read; give the row as `text`, written as the expert sees it"
            )


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token id sequences and where they came from.

    Args:
        starts: in each sequence, the position of the first token that the assistant says in its last turn; 0 where
            there are no turns. Empty: 0 in all.
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
class TextSource:
    """Where calibration text comes from.

    `FILE` is text. `self` is text that the expert writes, `self:FILE` are its answers to the file's questions, and
    `FILE+self` is a file's text, filled up to the number of tokens by the expert. (`./self` is a file of that name.)
    """

    text: Path | None = None
    questions: Path | None = None
    own: bool = False  # the expert writes

    @classmethod
    def parse(cls, value: str | Path) -> "TextSource":
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

    def resolved(self, resolve: Callable[[str], Path]) -> "TextSource":
        """The same with its file put in place, as `family.toml` does with relative paths."""
        text, questions = (None if file is None else resolve(str(file)) for file in (self.text, self.questions))
        return TextSource(text, questions, self.own)


def _named(file: str, value: str) -> Path:
    if not file:
        raise ConfigError(f"calibration: {value!r} names no file; give FILE, self, self:FILE or FILE+self")
    return Path(file)


def gather(
    source: str | Path | TextSource,
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
    source = source if isinstance(source, TextSource) else TextSource.parse(source)
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
        file: see `read_calibration_rows`.
        max_tokens: sequences are taken in order until they hold this many tokens; each is cut at 512, or at what the
            model takes.

    Raises:
        ConfigError: no such file, a row in none of the forms, no text at all, no tokenizer, or another model's.
    """
    file = Path(file)
    rows = read_calibration_rows(_existing(file))
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
        file: see `read_calibration_rows`. A line of `.txt`, and a `prompt` that is a text, is a user's message. What
            follows the last user message is left out.

    Raises:
        ConfigError: no such file, a row without a question, or no row at all.
    """
    found = []
    for row in read_calibration_rows(_existing(file)):
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
    if file.is_dir():
        raise ConfigError(f"{file}: is a directory; give one .txt, .jsonl or .json file of calibration text")
    if not file.is_file():
        raise ConfigError(f"{file}: no such calibration file; give a .txt, .jsonl or .json file, or `none`")
    return file


def _written(row: CalibrationRow, tokenizer: ChatTokenizer, file: Path) -> tuple[str, str]:
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
        prompts: a file of questions that it answers (`load_questions`), again and again until there are
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
    say(f"calibration: it wrote {plural(len(kept), 'sequence')}, {plural(total, 'token')}{less}{losses}")
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

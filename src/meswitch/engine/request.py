"""One request's life: tokens in from the batch, text out to whoever waits.

The pieces of text that are sent, joined, are what decoding all tokens at once gives. `tokenizers.decoders.DecodeStream`
does the same for most texts. It raises where an invalid byte follows whole characters spelt in bytes, drops what is
incomplete at the end, and does not know transformers' clean-up of spaces.
"""

import itertools
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from meswitch.engine.grammar import GrammarMatcher
from meswitch.engine.sampling import SamplingParams, SamplingState
from meswitch.engine.scores import TokenLogprobs
from meswitch.errors import MeswitchError
from meswitch.tokenizer import ChatTokenizer, Prompt, conversation_of

logger = logging.getLogger("meswitch.engine")

_FIRST_MARK = 0xD800
_CONTEXT = 8  # tokens of the prompt that decoding starts from, at first
_REPLACEMENT = "\ufffd"
# The end of a text that may still lose a space to the clean-up: " ." -> ".", " ' " -> "'", " n't" -> "n't",
# " 've" -> "'ve". One replacement can make room for another, so all that such beginnings consist of is kept together.
_UNSETTLED = re.compile(r"(?: [ 'nvr]*)?\Z")
TRACE: ContextVar[str] = ContextVar("meswitch_trace", default="")
"""Who asks, in the words of whoever asks: ids of requests begin with it, and with them lines of the log."""

# (all new tokens so far, finished, error text or None)
Listener = Callable[[list[int], bool, str | None], None]


def stopped(reason: str | None) -> MeswitchError:
    """What somebody is told who asks an engine that answers no more. reason: None if it was closed."""
    return MeswitchError(f"the engine has stopped: {reason or 'it was closed'}; start it again")


def tell(request: str, listener: Listener, tokens: list[int], finished: bool, error: str | None) -> None:
    """Give a request's listener its tokens; what it raises is its own fault, and no other request's."""
    try:
        listener(tokens, finished, error)
    except Exception:
        logger.exception("what request %s was told could not be taken", request)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer.

    Args:
        text: new text.
        tokens: how many are new. A piece may have tokens without text, or text of tokens that came earlier.
        finish_reason: `stop` or `length` on the last piece, `error` if the request failed.
        error: why it did.
        logprobs: of the new tokens, if they were asked for.
    """

    text: str
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    Args:
        text: of it.
        model: who gave it.
        tokens: generated ids, the end token included.
        prompt_tokens: how many the prompt has.
        finish_reason: `stop` or `length`.
        ttft: seconds to the first token.
        duration: seconds to the last.
        logprobs: of the tokens, if they were asked for.
        prompt_logprobs: of the prompt's tokens, if they were asked for; the first has none.
    """

    text: str
    model: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    ttft: float
    duration: float
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass(eq=False)
class Request:
    """A running request. Iterate for chunks as they come, or call `result`.

    Args:
        said: what `prompt` was encoded from.
        on_end: is called once, from any thread, when the answer is complete or has failed, before anybody reads its
            last piece.
        trace: what `TRACE` said when it was asked.
        created, started, first, ended: seconds of `time.perf_counter` when it was asked, had its expert's slot, had its
            first token, and was complete.

    Raises:
        ConfigError: the parameters do not fit to the tokenizer.
    """

    id: str
    model: str
    prompt: list[int]
    params: SamplingParams
    tokenizer: ChatTokenizer
    on_chunk: Callable[[Chunk], None] | None = None
    created: float = field(default_factory=time.perf_counter)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    said: Prompt | None = None
    stopped_by: str | int | None = None
    """The stop text or stop token of the request's parameters that ended the answer, if one did."""
    on_end: "Callable[[Request], None] | None" = None
    trace: str = ""
    started: float | None = None
    first: float | None = None
    ended: float | None = None
    _text: str = ""  # with marks where special tokens are that a stop text names
    _sent: int = 0  # characters of it that are in chunks
    _told: int = 0  # tokens that chunks have counted
    _chunks: "queue.SimpleQueue[Chunk]" = field(default_factory=queue.SimpleQueue)
    _done: threading.Event = field(default_factory=threading.Event)
    _ending: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _is_ended: bool = False

    def __post_init__(self) -> None:
        self._listen()

    def _listen(self) -> None:
        params = self.params
        params.check_tokens(self.tokenizer.vocab_size)
        self.ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.tokenizer.ends)
        matcher = None if params.grammar is None else GrammarMatcher(params.grammar, self.tokenizer)
        self.sampling = SamplingState(params, self.prompt, self.ends, matcher)
        stops = (*params.stop, *(() if params.ignore_eos else self.tokenizer.stops))
        texts, marks = _marked(stops, self.tokenizer.hidden)
        for token, text in self.tokenizer.hidden.items():
            if text in params.shown:
                marks.setdefault(token, chr(_FIRST_MARK + len(marks)))
        self._shown = {ord(mark): self.tokenizer.hidden[token] for token, mark in marks.items()}
        self._shown = {mark: text for mark, text in self._shown.items() if text in params.shown}
        self._stops = {StopText(text): plain for text, plain in texts.items()}
        self._detokenizer = Detokenizer(self.tokenizer, self.prompt, marks)

    def respell(
        self, tokenizer: ChatTokenizer, fit: Callable[[ChatTokenizer, int, SamplingParams], SamplingParams]
    ) -> None:
        """Before the first token: take the tokenizer of the version that answers, if it is not the one that encoded.

        Args:
            tokenizer: of that version.
            fit: makes the answer's length fit to a prompt of so many tokens.

        Raises:
            MeswitchError: it does not encode this prompt, or the prompt was token ids, of which nobody knows what they
                stand for now.
        """
        if tokenizer is self.tokenizer:
            return
        if self.said is None or (not isinstance(self.said, str) and conversation_of(self.said) is None):
            raise MeswitchError(f"expert {self.model!r} got another tokenizer while this request waited; ask again")
        self.prompt = tokenizer.encode(self.said)
        self.params = fit(tokenizer, len(self.prompt), self.params)
        self.tokenizer = tokenizer
        self._listen()

    def feed(self, tokens: Sequence[int], finished: bool) -> bool:
        """Take all tokens so far; True when the answer is complete (a stop text may come before the batch's end).

        Whatever goes wrong ends this request with an error, and no other.
        """
        if self._done.is_set():
            return True
        try:
            return self._take(tokens, finished)
        except Exception as error:
            logger.exception("the text of request %s cannot be written", self.id)
            self.fail(f"its text cannot be written ({type(error).__name__}: {error})")
            return True

    def _take(self, tokens: Sequence[int], finished: bool) -> bool:
        new = tokens[len(self.tokens) :]
        if new and self.first is None:
            self.first = time.perf_counter()
        self.tokens = list(tokens)
        ended = bool(self.tokens) and self.tokens[-1] in self.ends
        self._text += self._detokenizer.feed(new[:-1] if ended and new else new, last=finished)
        if len(self.tokens) < self.params.min_new_tokens:
            for one in self._stops:
                one.skip(self._text)
        found = {plain: at for stop, plain in self._stops.items() if (at := stop.find(self._text)) is not None}
        if ended and self.tokens[-1] in self.params.stop_token_ids:
            self.stopped_by = self.tokens[-1]
        if found:
            stop = min(found, key=found.__getitem__)
            self.stopped_by = stop if stop in self.params.stop else None  # the expert's own stop texts are its ends
            self._text = self._text[: found[stop]]
            finished, ended = True, True
        # text that may turn out to be the beginning of a stop text is held back
        held = max((stop.begun for stop in self._stops), default=0)
        upto = len(self._text) if finished else len(self._text) - held
        piece, self._sent = self._text[self._sent : upto], max(self._sent, upto)
        reason = ("stop" if ended else "length") if finished else None
        piece = self._written(piece)
        if finished:
            if not self._claims_end():
                return True
            self._close(reason)
        if piece or finished:
            logprobs = tuple(self.sampling.logprobs[self._told : len(self.tokens)])
            self._emit(Chunk(piece, len(self.tokens) - self._told, reason, logprobs=logprobs))
            self._told = len(self.tokens)
        if finished:
            self._done.set()
        return finished or self._done.is_set()

    def fail(self, error: str) -> None:
        """End with an error, unless it has ended."""
        if self._claims_end():
            self.error = error
            self._close("error")
            self._emit(Chunk("", 0, "error", error))
            self._done.set()

    def _claims_end(self) -> bool:
        """Whether the caller is the one who ends it: whoever reads the last chunk may cancel at the same moment."""
        with self._ending:
            is_first = not self._is_ended
            self._is_ended = True
            return is_first

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks until the last.

        Raises:
            MeswitchError: the request failed.
        """
        while True:
            chunk = self._chunks.get()
            if chunk.error is not None:
                raise MeswitchError(chunk.error)
            yield chunk
            if chunk.finish_reason is not None:
                return

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the whole answer.

        Raises:
            MeswitchError: the request failed, or is not done within `timeout` seconds.
        """
        if not self._done.wait(timeout):
            raise MeswitchError(f"request {self.id} is not done after {timeout} s")
        if self.error is not None:
            raise MeswitchError(self.error)
        ended = self.ended or self.created
        return Completion(
            text=self._written(self._text),
            model=self.model,
            tokens=tuple(self.tokens),
            prompt_tokens=len(self.prompt),
            finish_reason=self.finish_reason or "stop",
            ttft=(self.first or ended) - self.created,
            duration=ended - self.created,
            logprobs=tuple(self.sampling.logprobs[: len(self.tokens)]),
            prompt_logprobs=tuple(self.sampling.prompt_logprobs),
        )

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def _written(self, text: str) -> str:
        """A text without its marks; special tokens that are shown are written."""
        return _without_marks(text.translate(self._shown) if self._shown else text)

    def _emit(self, chunk: Chunk) -> None:
        self._chunks.put(chunk)
        if self.on_chunk is not None:
            try:
                self.on_chunk(chunk)
            except Exception as error:
                logger.exception("on_chunk of request %s", self.id)
                self.on_chunk = None
                self.fail(f"on_chunk: {type(error).__name__}: {error}")

    def _close(self, reason: str | None) -> None:
        self.finish_reason = reason
        self.ended = time.perf_counter()
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            try:
                on_end(self)
            except Exception:  # who counts requests must not end them
                logger.exception("the end of request %s", self.id)


class StopText:
    """Looks for a text in another that grows, each character once (Knuth, Morris and Pratt).

    Args:
        text: what ends the answer; not empty.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._seen = 0
        self.begun = 0
        """How many characters at the end of what was seen may be the beginning of the text."""
        self._back = [0] * len(text)  # of its first n characters, the longest proper beginning that is also their end
        length = 0
        for at in range(1, len(text)):
            length = self._after(length, text[at])
            self._back[at] = length

    def _after(self, begun: int, character: str) -> int:
        while begun and character != self._text[begun]:
            begun = self._back[begun - 1]
        return begun + (character == self._text[begun])

    def skip(self, text: str) -> None:
        """Look in what comes after this only."""
        self._seen, self.begun = len(text), 0

    def find(self, text: str) -> int | None:
        """Where it begins for the first time, None if it is not there yet. text: what was given before, and more."""
        for at in range(self._seen, len(text)):
            self.begun = self._after(self.begun, text[at])
            if self.begun == len(self._text):
                return at + 1 - self.begun
        self._seen = len(text)
        return None


def _marked(stops: Sequence[str], hidden: Mapping[int, str]) -> tuple[dict[str, str], dict[int, str]]:
    """What to look for in the text -> the stop text that it is of, and token id -> its mark.

    A special token leaves no text behind. In a stop text that names some, a mark stands for each; the same characters
    spelt by ordinary tokens count as well.
    """
    if not stops:
        return {}, {}
    ids = {text: token for token, text in hidden.items()}
    marks: dict[int, str] = {}

    def mark(found: re.Match[str]) -> str:
        return marks.setdefault(ids[found[0]], chr(_FIRST_MARK + len(marks)))

    names = re.compile("|".join(re.escape(text) for text in sorted(ids, key=len, reverse=True)) or r"(?!)")
    return {names.sub(mark, stop): stop for stop in stops} | {stop: stop for stop in stops}, marks


def _without_marks(text: str) -> str:
    return "".join(character for character in text if not is_mark(character))


class Detokenizer:
    """The text of one answer, a piece at a time.

    A piece waits while later tokens can still change it: half a character, and with byte fallback a run of bytes,
    because one invalid byte makes the whole run invalid.

    Args:
        prompt: token ids. The answer's text is what it adds to the prompt's: the space between them is there.
        marks: token id -> a character that takes the place of a special token in the text. Others leave no trace.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, prompt: Sequence[int] = (), marks: Mapping[int, str] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._marks = marks or {}
        self._waiting: list[tuple[int, str]] = []  # marks, and how many tokens are before each
        self._ids = self._context(prompt)  # decoding starts here: without a word before it, a space may be lost
        self._shown = len(self._ids)
        self._cleaner = _Cleaner(tokenizer, self._decode(self._ids)) if tokenizer.cleans_spaces else None

    def feed(self, tokens: Iterable[int], *, last: bool = False) -> str:
        """New tokens -> new text. last: nothing waits any longer."""
        for token in tokens:
            if self._tokenizer.is_visible(token):
                self._ids.append(token)
            elif token in self._marks:
                self._waiting.append((len(self._ids), self._marks[token]))
        text = self._new_text(last)
        return text if self._cleaner is None else self._cleaner.feed(text, last)

    def _new_text(self, last: bool) -> str:
        text = self._decode(self._ids)
        held = len(self._ids) > self._shown and (
            text.endswith(_REPLACEMENT) or self._ids[-1] in self._tokenizer.byte_tokens
        )
        if held and not last:
            return ""
        before = self._decode(self._ids[: self._shown])
        start = _shared(before, text)
        pieces = []
        for count, mark in self._waiting:
            end = max(start, min(len(text), len(self._decode(self._ids[:count]))))
            pieces += [text[start:end], mark]
            start = end
        pieces.append(text[start:])
        self._waiting.clear()
        if len(text) > len(before):  # so the next piece has a word before it
            del self._ids[: self._shown]
        self._shown = len(self._ids)
        return "".join(pieces)

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The end of the prompt, from where a word begins."""
        visible: list[int] = []
        wanted = _CONTEXT
        for token in reversed(prompt):
            if not self._tokenizer.is_visible(token):
                continue
            visible.append(token)
            if len(visible) >= wanted:
                text = self._decode(visible[::-1])
                if text and not text.startswith(_REPLACEMENT) and token not in self._tokenizer.byte_tokens:
                    break
                wanted *= 2
        return visible[::-1]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class _Cleaner:
    """transformers' clean-up of spaces before punctuation, on a text that comes in pieces.

    Args:
        before: the end of the text that stands before the first piece.
    """

    def __init__(self, tokenizer: ChatTokenizer, before: str) -> None:
        self._clean = tokenizer.tokenizer.clean_up_tokenization
        self._held = before[_unsettled(before) :]
        self._skip = self._clean(self._held)  # it is there already

    def feed(self, text: str, last: bool) -> str:
        text = self._held + text
        plain = "".join(character for character in text if not is_mark(character))
        settled = len(plain) if last else _unsettled(plain)
        cleaned = self._clean(plain[:settled])
        kept, taken, seen = [], 0, 0
        for place, character in enumerate(text):
            if not is_mark(character):
                if seen == settled:
                    self._held = text[place:]
                    break
                seen += 1
                if taken == len(cleaned) or cleaned[taken] != character:  # a space that goes
                    continue
                taken += 1
            kept.append(character)
        else:
            self._held = ""
        piece = "".join(kept)
        skip, self._skip = self._skip, "" if settled else self._skip
        return piece[_shared(skip, piece) :]


def is_mark(character: str) -> bool:
    """Whether it is half of a surrogate pair: no text that a tokenizer writes holds one, so marks are made of them."""
    return "\ud800" <= character <= "\udfff"


def _shared(first: str, second: str) -> int:
    """How many characters two texts have in common from their beginning."""
    if second.startswith(first):
        return len(first)
    return next(i for i, (a, b) in enumerate(itertools.zip_longest(first, second)) if a != b)


def _unsettled(text: str) -> int:
    """Where the part begins that later text may still change."""
    found = _UNSETTLED.search(text)
    assert found is not None
    return found.start()

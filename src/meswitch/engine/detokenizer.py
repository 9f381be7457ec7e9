"""From a growing list of tokens to text: what is sent, joined, is what decoding everything at once gives.

`tokenizers.decoders.DecodeStream` does the same for most texts. It raises where an invalid byte follows whole
characters spelt in bytes, drops what is incomplete at the end, and does not know transformers' clean-up of spaces.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from meswitch.tokenizer import ChatTokenizer

_CONTEXT = 8  # tokens of the prompt that decoding starts from, at first
_REPLACEMENT = "\ufffd"
# The end of a text that may still lose a space to the clean-up: " ." -> ".", " ' " -> "'", " n't" -> "n't",
# " 've" -> "'ve". One replacement can make room for another, so all that such beginnings consist of is kept together.
_UNSETTLED = re.compile(r"(?: [ 'nvr]*)?\Z")


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

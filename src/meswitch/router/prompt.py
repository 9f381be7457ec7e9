"""The multiple-choice question that the LLM router asks: one lettered option an expert, and "none of these".

The options come before the query, so everything up to the query is the same for all queries of a batch and its keys
and values are computed once. The query is tokenised apart from the rest, with the tokenizer's special tokens taken as
plain text: a user cannot end the question and write another.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from meswitch.errors import ConfigError
from meswitch.router.lexical import clip

LETTERS = string.ascii_uppercase + string.ascii_lowercase
NONE_OF_THESE = "None of these."
_MARK, _OPTIONS = "\x1fquery\x1f", "\x1foptions\x1f"  # places in the text; no text that a person types has them
_ARROW = " ="
_QUESTION = "Which option is the request below for? Answer with its letter."


@dataclass(frozen=True, slots=True)
class Question:
    """A tokenised question with a gap for the query: `before` + query + `after`, then the letter."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class Prompt:
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

    def question(self, options: Sequence[str]) -> Question:
        """The question with these options, in this order; A is the first.

        Raises:
            ConfigError: more options than letters.
        """
        if not 1 < len(options) <= len(self.letter_ids):
            raise ConfigError(f"options: {len(options)}; a question has 2 to {len(self.letter_ids)} lettered options")
        return self._written(tuple(options))

    def _write(self, options: tuple[str, ...]) -> Question:
        head, _, tail = self._before.partition(_OPTIONS)
        ids = self._ids(head)
        for letter, option in zip(self.letter_ids, options, strict=False):
            ids += [*self._ids(one_line(option) + _ARROW), letter, *self._ids("\n")]
        return Question((*ids, *self._ids(tail)), tuple(self._ids(self._after)))

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

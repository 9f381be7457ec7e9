"""What an answer must be: JSON, JSON of a schema, a regular expression, a grammar. `llguidance` follows them.

It is an extra (`pip install "meswitch[grammar]"`); only a request that has a grammar needs it.
"""

import importlib.util
import json
import threading
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from meswitch.errors import ConfigError, MeswitchError
from meswitch.tokenizer import ChatTokenizer

Kind = Literal["json_schema", "one_line", "regex", "lark", "choice", "marked"]
KINDS: tuple[Kind, ...] = ("json_schema", "one_line", "regex", "lark", "choice", "marked")
MAX_GRAMMAR = 1 << 16  # characters
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # name -> schema
# What says, or may say, that an object has other properties.
_OTHERS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref"}
_VALUES = {"enum", "const", "default", "examples", "allOf"}  # no schemas, or parts that only together are one
_SPACE = r"[ \t\r\n]{0,16}"  # between the parts of JSON; without a limit small models write nothing else
EXTRA = 'needs the package llguidance: pip install "meswitch[grammar]"'


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of an answer must be.

    Args:
        kind: `json_schema`; `one_line`, the same without line breaks and spaces to choose; `regex`; `lark`, a
            context-free grammar in Lark's form; `choice`; `marked`, any text in which what stands between two marks is
            JSON of a schema, in one line.
        text: the schema as JSON, the expression, the grammar, a JSON list of texts, one of which is the answer, or
            what `marked` gives.
        after: a text, such as the end of a thought; what comes before and it are free. Empty for none.

    Raises:
        ConfigError: no such kind, or a text that is too long.
    """

    kind: Kind
    text: str
    after: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"grammar: the kind {self.kind!r} is none of {', '.join(KINDS)}")
        if not isinstance(self.text, str) or len(self.text) > MAX_GRAMMAR:
            raise ConfigError(f"grammar: expected a text of up to {MAX_GRAMMAR} characters")


def marked(schema: str, start: str, end: str, *, are_tokens: bool, after: str = "") -> Grammar:
    """A grammar of any text in which what stands between two marks is JSON of a schema, a line of its own.

    Args:
        schema: as JSON.
        start: the mark before it, such as `<tool_call>`.
        end: the mark behind it.
        are_tokens: whether the marks are special tokens.
        after: see `Grammar`.
    """
    return Grammar("marked", json.dumps([json.loads(schema), start, end, are_tokens]), after)


ANY_JSON = Grammar("json_schema", '{"type": "object"}')


def is_available() -> bool:
    return importlib.util.find_spec("llguidance") is not None


_tokenizers: "weakref.WeakKeyDictionary[ChatTokenizer, Any]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class GrammarMatcher:
    """Follows one answer through a grammar.

    Args:
        grammar: what the answer must be.
        tokenizer: of the expert that answers.

    Raises:
        ConfigError: llguidance is not there, cannot read the grammar, or does not know such a tokenizer.
    """

    def __init__(self, grammar: Grammar, tokenizer: ChatTokenizer) -> None:
        if not is_available():
            raise ConfigError(f"grammar: {EXTRA}")
        if not tokenizer.ends:
            raise ConfigError(f"grammar: {tokenizer.name!r} has no end token, so that no grammar can end its answer")
        from llguidance import LLMatcher

        known = _known(tokenizer)
        try:
            self._matcher = LLMatcher(known, _compiled(grammar))
            self._raise_failure()
        except (ValueError, RecursionError, MeswitchError) as error:
            raise ConfigError(f"grammar: the {grammar.kind.replace('_', ' ')} cannot be used: {error}") from error
        self._words = (tokenizer.vocab_size + 31) // 32
        self._after = grammar.after.encode()
        self._tokenizer, self._seen = tokenizer, b""

    def fill(self, mask: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Write which tokens may come next. mask: [at least vocabulary / 32, rounded up] int32 in one piece."""
        if self._after:
            mask[:] = -1
            return
        words = mask[: self._words]
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._raise_failure()

    def accept(self, token: int) -> None:
        """Take the next token.

        Raises:
            MeswitchError: it is not allowed, or the grammar takes too much to follow.
        """
        if self._after:
            self._seen = (self._seen + self._tokenizer.token_bytes(token))[-4 * len(self._after) - 64 :]
            if self._after in self._seen:
                self._after = b""
            return
        if not self._matcher.consume_token(token):
            self._raise_failure()
            raise MeswitchError(f"token {token} is not allowed here")

    def _raise_failure(self) -> None:
        if self._matcher.is_error():
            raise MeswitchError(self._matcher.get_error().strip().splitlines()[0])


def _compiled(grammar: Grammar) -> str:
    """llguidance's form. Raises: ValueError: it is not what it says it is."""
    from llguidance import LLMatcher

    if grammar.kind in ("json_schema", "one_line"):
        schema = json.dumps(_closed(json.loads(grammar.text)))
        spaces: Any = {"whitespace_flexible": False}
        if grammar.kind == "json_schema":
            spaces = {"whitespace_pattern": _SPACE}
        return str(LLMatcher.grammar_from_json_schema(schema, spaces))
    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.text))
    if grammar.kind == "choice":
        texts = json.loads(grammar.text)
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in texts)))
    if grammar.kind == "marked":
        return str(LLMatcher.grammar_from_lark(_marked_lark(*json.loads(grammar.text))))
    return str(LLMatcher.grammar_from_lark(grammar.text))


def _marked_lark(schema: Any, start: str, end: str, are_tokens: bool) -> str:
    body = json.dumps(_closed(schema) | {"x-guidance": {"whitespace_pattern": " ?"}})
    if are_tokens:
        begin, last = f"call: TEXT {start}", end
    else:  # lazy: it ends with the first mark, so that none stands in the free text
        begin, last = f"opening[lazy]: TEXT {json.dumps(start)}\ncall: opening", json.dumps(end)
    free = "start: call* rest\nrest: TEXT\nTEXT: /(.|\\n)*/"
    return f'%llguidance {{}}\n{free}\n{begin} "\\n" %json {body} "\\n" {last}\n'


def _closed(schema: Any) -> Any:
    """A schema whose objects have the properties that it names, unless it says itself what others there may be.

    A schema without `additionalProperties` allows any; nobody who asks for three fields wants to read of more.
    """
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: value if key in _VALUES else _closed(value) for key, value in schema.items() if key not in _NAMED}
    for key in _NAMED & schema.keys():
        named = schema[key]
        out[key] = {name: _closed(one) for name, one in named.items()} if isinstance(named, dict) else named
    if isinstance(schema.get("properties"), dict) and not _OTHERS & schema.keys():
        out["additionalProperties"] = False
    return out


def _known(tokenizer: ChatTokenizer) -> Any:
    """llguidance's own form of a tokenizer, which takes up to a second to make: made once."""
    from llguidance.hf import from_tokenizer

    with _lock:
        found = _tokenizers.get(tokenizer)
        if found is None:
            try:
                found = from_tokenizer(tokenizer.tokenizer, n_vocab=tokenizer.vocab_size, eos_token=tokenizer.ends)
            except Exception as error:
                raise ConfigError(
                    f"grammar: llguidance cannot use the tokenizer of {tokenizer.name!r}: {error}"
                ) from error
            _tokenizers[tokenizer] = found
        return found

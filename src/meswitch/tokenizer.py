"""How one expert reads and speaks: its tokenizer, chat template, end tokens, vocabulary and context length.

`ChatTokenizer.open` is the only way to them. `compress`, `verify` and the engine all use it, so what cannot be served
is found when an expert is compressed.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from meswitch.configuration import read_config
from meswitch.errors import ConfigError
from meswitch.jsonfile import disguise, json_kind, read_json

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and what else a chat template is given.

    Args:
        messages: each with `role` and a text as `content`.
        tools: functions that the model may call, in OpenAI's form.
        variables: of the template, such as `enable_thinking`.
        continues: whether the answer goes on with the last message, instead of beginning a new one.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False


Prompt = str | Sequence[Message] | Conversation | Sequence[int]

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_OTHER_FILES = {"config.json", "generation_config.json", "meswitch.json", "model.safetensors.index.json"}
_OTHER_SUFFIXES = {".safetensors", ".bin", ".gguf", ".md"}
_LARGEST = 1 << 28  # bytes; larger ones are a training's states, or weights in other formats
_NONE = "no tokenizer.json (nor tokenizer.model); copy the tokenizer's files into its checkpoint and compress again"
_QUESTION, _ANSWER = "QUESTION-7", "ANSWER-7"  # told from everything that a template says by itself
# What tokenizers of the wrong kind get wrong: spaces, line breaks, digits, other scripts, code.
_PROBES = (
    "Hello world, it's 2024!  Two  spaces,\ttab,\n\nlines.",
    " leading and trailing ",
    "déjà vu Ünïcode 漢字 العربية 😀",
    "def f(x):\n    return x[0] + 12345.678e-9  # 100%\n",
    "<|user|>a</s> b",
)
_TOOL = "tool_question_7"
# What templates are given by us, and what Jinja and transformers give them.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
_GIVEN |= {"namespace", "range", "dict", "cycler", "joiner", "lipsum", "raise_exception", "strftime_now"}
# Nobody writes it (Unicode says so): it stands inside a control token that somebody wrote in a message.
_BREAK = "\ufdd0"
_SHRINKS = 4  # times that a tokenizer may shorten a text before it takes it apart: spaces become one, letters join
_WORDS = re.compile(r"\w+")
_proven: set[bytes] = set()  # digests of tokenizer files that this process has compared already
_open: WeakValueDictionary[bytes, Any] = WeakValueDictionary()  # transformers' tokenizers that are served, by digest
_plain_of: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # for each of these, one to which control tokens are text


def max_length(config: Any) -> int:
    """Tokens of the longest text that a model takes, by its configuration."""
    config = config.get_text_config()
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # MPT's own name
    return next(filter(None, lengths), 1 << 20)


class ChatTokenizer:
    """Made by `open`.

    Attributes:
        name: of the expert, for messages.
        tokenizer: transformers' tokenizer.
        vocab_size: token ids are smaller.
        max_length: tokens of a prompt and its answer together.
        stops: texts that end an answer and are not part of it: the generation config's `stop_strings`.
        ends: token ids that end an answer, in ascending order: all that the generation config, the model config, the
            tokenizer and the chat template name.
        hidden: id -> text of the special tokens that are no part of a text.
        byte_tokens: ids that stand for one byte each, `<0x0A>` and so on.
        cleans_spaces: whether decoding takes spaces before punctuation out.
    """

    def __init__(
        self, name: str, directory: Path, tokenizer: Any, config: Any, stated: tuple[list[int], list[str]]
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.vocab_size: int = config.get_text_config().vocab_size
        self.max_length = max_length(config)
        self.hidden = _hidden(tokenizer)
        self.byte_tokens = _byte_tokens(tokenizer)
        self.cleans_spaces = _cleans_spaces(tokenizer)
        self._in_parts = False  # whether the template wants content as a list of parts
        if tokenizer.chat_template or (directory / "chat_template.jinja").is_file():
            self._check_template(_template_file(directory))
        stated_ends, self.stops = stated
        ends = {*stated_ends, tokenizer.eos_token_id, self._end_of_turn()}
        self.ends = sorted(i for i in ends if i is not None and 0 <= i < self.vocab_size)

    @classmethod
    def open(cls, name: str, directory: Path) -> "ChatTokenizer":
        """Read it from a checkpoint's or an artifact's directory, and try it.

        Experts whose files are alike share transformers' tokenizer: one of 128,000 tokens takes tens of MB.

        Raises:
            ConfigError: there is none, a file is damaged, or the parts do not fit together. The message names the
                file, the cause and the fix.
        """
        if not has_tokenizer(directory):
            raise ConfigError(f"{directory}: {name!r} has {_NONE}")
        stated = _stated_ends(directory)
        config = read_config(directory)
        digest = _digest(directory, config)
        tokenizer = _open.get(digest)
        if tokenizer is None:
            tokenizer = load_tokenizer(directory, config)
            if _digest(directory, config) == digest:  # not if the expert was replaced meanwhile
                _open[digest] = tokenizer
        return cls(name, directory, tokenizer, config.get_text_config(), stated)

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @property
    def end_texts(self) -> list[str]:
        """The texts of the end tokens."""
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(self.ends)]

    def encode(self, prompt: Prompt) -> list[int]:
        """Text, chat messages (through the chat template) or token ids -> token ids.

        Raises:
            ConfigError: no chat template, messages that it refuses or leaves out, a token id outside the vocabulary,
                or nothing at all.
        """
        conversation = conversation_of(prompt)
        if conversation is not None:
            tokens = self._safe_ids(self._render(conversation))
        elif isinstance(prompt, str):
            tokens = self.text_ids(prompt, special=True)
        else:
            tokens = [int(token) for token in prompt]  # type: ignore[arg-type, union-attr]
        if not tokens:
            raise ConfigError("prompt: it is empty")
        if not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise ConfigError(f"prompt: token ids of {self.name!r} lie between 0 and {self.vocab_size - 1}")
        return tokens

    def least_tokens(self, prompt: Prompt) -> int:
        """A number of tokens that a text has at least, without reading it: most have many times more.

        Args:
            prompt: what `encode` takes; of token ids, which are quickly counted, it says nothing.
        """
        conversation = conversation_of(prompt)
        if isinstance(prompt, str):
            characters = len(prompt)
        elif conversation is not None:
            contents = (message.get("content") for message in conversation.messages if isinstance(message, Mapping))
            characters = sum(len(content) for content in contents if isinstance(content, str))
        else:
            return 0
        return characters // (_SHRINKS * self._longest)

    @functools.cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    def render(self, messages: Sequence[Message] | Conversation, *, answer: bool = True) -> str:
        """A conversation in the chat template's form.

        Args:
            messages: each with `role` and a text as `content`, or a conversation of such.
            answer: whether the text ends where the assistant begins to speak.

        Raises:
            ConfigError: there is no template; a message has no text; the template refuses one, or leaves one out.
        """
        conversation = messages if isinstance(messages, Conversation) else Conversation(messages)
        return self._render(conversation, answer=answer).replace(_BREAK, "")

    def _render(self, conversation: Conversation, *, answer: bool = True) -> str:
        """As `render`; in a control token that somebody wrote in a message stands `_BREAK` after its first character.

        So the template's own control tokens are told from those that would end the user's turn and begin another.
        """
        if not self.has_template:
            raise ConfigError(f"{self.name!r} has no chat template: send text to the completions API instead")
        messages = conversation.messages
        for index, message in enumerate(messages):
            for name in ("role", "content"):
                if not isinstance(message.get(name), str):
                    found = json_kind(message[name]) if name in message else "nothing"
                    raise ConfigError(f"messages[{index}].{name}: expected a text, found {found}")
        if conversation.tools and not self.shows_tools:
            raise ConfigError(f"tools: the chat template of {self.name!r} shows no tools")
        for name, value in conversation.variables.items():
            if name not in self._variables and value not in (None, False):
                known = ", ".join(sorted(self._variables)) or "none"
                raise ConfigError(f"chat_template_kwargs.{name}: the chat template of {self.name!r} reads {known}")
        try:
            text = self._rendered(self._disarmed(conversation), answer and not conversation.continues)
        except Exception as error:  # templates raise what they like
            raise ConfigError(
                f"messages: the chat template of {self.name!r} refuses them: {_first_line(error)}"
            ) from error
        for index, message in enumerate(messages):
            # a system message is another matter: models without one are asked by clients that always send one
            if message["role"] != "system" and not _says(text.replace(_BREAK, ""), message["content"]):
                raise ConfigError(
                    f"messages[{index}]: the chat template of {self.name!r} leaves it out (role {message['role']!r})"
                )
            for call in message.get("tool_calls") or ():
                if not _says(text.replace(_BREAK, ""), call["function"]["name"]):
                    raise ConfigError(
                        f"messages[{index}].tool_calls: the chat template of {self.name!r} leaves them out"
                    )
        return text

    def decode(self, tokens: Sequence[int]) -> str:
        """Without special tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def is_visible(self, token: int) -> bool:
        """Whether a token is part of a text: no special token, and no row of a padded vocabulary."""
        return token not in self.hidden and self.tokenizer.convert_ids_to_tokens(token) is not None

    def text_ids(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text. special: with those that the tokenizer itself sets at its beginning or end."""
        try:
            return list(self.tokenizer(text, add_special_tokens=special).input_ids)
        except (TypeError, UnicodeError):
            raise ConfigError("prompt: not valid Unicode text (half of a surrogate pair)") from None

    def _safe_ids(self, text: str) -> list[int]:
        """Token ids of a rendered conversation; control tokens that somebody wrote become ordinary text."""
        if _BREAK not in text:
            return self.text_ids(text, special=False)
        tokens: list[int] = []
        for index, part in enumerate(self._broken.split(text)):
            if index % 2 == 0:
                tokens += self.text_ids(part.replace(_BREAK, ""), special=False) if part else []
            else:
                tokens += self._plain.encode(part.replace(_BREAK, ""), add_special_tokens=False).ids
        return tokens

    def _disarmed(self, conversation: Conversation) -> Conversation:
        def disarm(text: str) -> str:
            return self._control.sub(lambda found: found[0][0] + _BREAK + found[0][1:], text.replace(_BREAK, ""))

        messages = [
            {key: value if key == "role" else _each_text(value, disarm) for key, value in message.items()}
            for message in conversation.messages
        ]
        variables = {name: value for name, value in conversation.variables.items() if name in self._variables}
        tools = _each_text(list(conversation.tools), disarm)
        return Conversation(messages, tools, _each_text(variables, disarm), conversation.continues)

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        """The texts of control tokens."""
        return _any_of([text for text in self.hidden.values() if len(text) > 1])

    @functools.cached_property
    def _broken(self) -> re.Pattern[str]:
        texts = [text for text in self.hidden.values() if len(text) > 1]
        return re.compile(f"({_any_of([text[0] + _BREAK + text[1:] for text in texts]).pattern})")

    @functools.cached_property
    def _plain(self) -> Any:
        """The tokenizer of `tokenizers`, to which control tokens are text."""
        from tokenizers import Tokenizer

        plain = _plain_of.get(self.tokenizer)
        if plain is None:
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise ConfigError(f"messages: the tokenizer of {self.name!r} cannot read control tokens as text")
            plain = Tokenizer.from_str(backend.to_str())
            plain.no_truncation()
            plain.no_padding()
            plain.encode_special_tokens = True
            _plain_of[self.tokenizer] = plain
        return plain

    @functools.cached_property
    def _variables(self) -> frozenset[str]:
        """What the template may be told beside messages and tools."""
        from jinja2 import Environment, meta

        try:
            parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(str(self.tokenizer.chat_template))
            return frozenset(meta.find_undeclared_variables(parsed)) - _GIVEN - set(self.tokenizer.special_tokens_map)
        except Exception:  # noqa: BLE001 - of a template with extensions of its own it is not known
            return frozenset(re.findall(r"[a-z_]+", str(self.tokenizer.chat_template)))

    @functools.cached_property
    def shows_tools(self) -> bool:
        """Whether the template tells the model which functions it may call."""
        function = {"name": _TOOL, "description": "Asks.", "parameters": {"type": "object", "properties": {}}}
        tools = ({"type": "function", "function": function},)
        return self._shows(_TOOL, [{"role": "user", "content": _QUESTION}], tools)

    @functools.cached_property
    def shows_system(self) -> bool:
        """Whether the template tells the model what a system message says."""
        return self._shows(
            _ANSWER, [{"role": "system", "content": _ANSWER}, {"role": "user", "content": _QUESTION}], ()
        )

    def _shows(self, text: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> bool:
        if not self.has_template:
            return False
        try:
            return text in self._rendered(Conversation(messages, tools), answer=True)
        except Exception:  # noqa: BLE001 - a template that refuses does not show
            return False

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text: a part of a character, perhaps. Of a special token, its name."""
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a row of a padded vocabulary
            return b""
        if token in self.tokenizer.added_tokens_decoder or token in self.hidden:
            return str(name).encode()
        if token in self.byte_tokens:
            return bytes([int(name[3:5], 16)])
        if self._byte_letters:
            known = [self._byte_letters.get(letter) for letter in name]
            return bytes(byte for byte in known if byte is not None)
        return str(name).replace("\u2581", " ").encode(errors="replace")

    @functools.cached_property
    def _byte_letters(self) -> dict[str, int]:
        """Of a byte-level tokenizer: the letters that its tokens' names spell bytes with."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        decoder = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "decoder", None)
        is_byte_level = "ByteLevel" in repr(decoder) or (decoder is None and hasattr(self.tokenizer, "byte_decoder"))
        return {letter: byte for byte, letter in bytes_to_unicode().items()} if is_byte_level else {}

    def _rendered(self, conversation: Conversation, answer: bool) -> str:
        messages = [dict(message) for message in conversation.messages]
        if self._in_parts:
            messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=[dict(tool) for tool in conversation.tools] or None,
                tokenize=False,
                add_generation_prompt=answer,
                continue_final_message=conversation.continues,
                **conversation.variables,
            )
        )

    def _check_template(self, file: Path) -> None:
        """Find the form of content that the template shows, by a user's turn.

        Raises:
            ConfigError: the template is not one, or no form works.
        """
        from jinja2 import TemplateSyntaxError

        if file.suffix == ".jinja" and (found := disguise(file)) is not None:
            raise ConfigError(f"{file}: {found}")
        if str(self.tokenizer.chat_template).startswith("\ufeff"):
            raise ConfigError(f"{file}: the chat template begins with a byte order mark; save it without one")
        turn = {"role": "user", "content": _QUESTION}
        reason = "it leaves the user's text out"
        for turns in ([turn], [{"role": "system", "content": "Be kind."}, turn]):
            for in_parts in (False, True):
                self._in_parts = in_parts
                try:
                    text = self._rendered(Conversation(turns), answer=True)
                except TemplateSyntaxError as error:
                    raise ConfigError(
                        f"{file}: line {error.lineno} of the chat template: {error.message}; correct the template"
                    ) from None
                except Exception as error:  # noqa: BLE001 - templates raise what they like
                    reason = _first_line(error)
                    continue
                if _QUESTION in text:
                    self._check_ids(text, file)
                    return
        raise ConfigError(f"{file}: the chat template cannot show a user's message: {reason}; correct the template")

    def _check_ids(self, text: str, file: Path) -> None:
        largest = max(self.text_ids(text, special=False), default=0)
        if largest >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ConfigError(
                f"{file}: the chat template uses {token!r}, token {largest}; the model has {self.vocab_size} tokens: "
                "put the tokenizer files there that the model was trained with"
            )

    def _end_of_turn(self) -> int | None:
        """The token that the template sets after what the assistant said."""
        if not self.has_template:
            return None
        turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        try:
            after = self._rendered(Conversation(turns), answer=False).partition(_ANSWER)[2].lstrip()
        except Exception:  # noqa: BLE001 - a template that shows no answers names no end
            return None
        first = next(iter(self.text_ids(after, special=False)), None) if after else None
        return first if first in self.tokenizer.added_tokens_decoder else None


def conversation_of(prompt: Prompt) -> Conversation | None:
    """A prompt of messages, None if it is a text or token ids."""
    if isinstance(prompt, Conversation):
        return prompt
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
        return Conversation(prompt)  # type: ignore[arg-type]
    return None


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with each text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key) if isinstance(key, str) else key: _each_text(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(one, change) for one in value]
    return value


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Matches any of some texts, the longest first; nothing where there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has a file of a tokenizer."""
    return any((directory / file).is_file() for file in _FILES)


def load_tokenizer(directory: Path, config: Any = None) -> Any:
    """transformers' tokenizer, in a class that encodes and decodes as `tokenizer.json` says. No code is run.

    Args:
        directory: where its files are.
        config: the model's configuration, if it is read already.

    Raises:
        ConfigError: none does, or a file is damaged.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not has_tokenizer(directory):
        raise ConfigError(f"{directory}: has {_NONE}")
    file = directory / "tokenizer.json"
    for name in _JSON_FILES[1:]:
        if (directory / name).is_file():
            read_json(directory / name, ConfigError)
    _check_is_text(directory / "chat_template.jinja")
    kinds = (AutoTokenizer, PreTrainedTokenizerFast) if file.is_file() else (AutoTokenizer,)
    known = {} if config is None else {"config": config}
    reason = ""
    for kind in kinds:
        try:
            tokenizer = kind.from_pretrained(directory, trust_remote_code=False, **known)
        except Exception as error:  # noqa: BLE001 - of damaged files, libraries raise what they like
            if file.is_file():
                read_json(file, ConfigError)
            reason = reason or _first_line(error)
            continue
        if not tokenizer.chat_template:
            tokenizer.chat_template = _processor_template(directory)
        if not file.is_file() or _agrees(tokenizer, directory):
            return tokenizer
        reason = f"transformers' {type(tokenizer).__name__} encodes or decodes otherwise than tokenizer.json"
    raise ConfigError(
        f"{file if file.is_file() else directory}: the tokenizer cannot be used: {reason.removesuffix('.')}; load it "
        "where it works and save it again with its save_pretrained, which writes a tokenizer.json"
    )


def _digest(directory: Path, config: Any) -> bytes:
    """Of all that `load_tokenizer` may go by: the model's kind, and every file that is not surely another thing."""
    digest = hashlib.sha256(repr((type(config), getattr(config, "tokenizer_class", None))).encode())
    for file in sorted([*directory.iterdir(), *directory.glob("additional_chat_templates/*")]):
        if file.is_file() and file.name not in _OTHER_FILES and file.suffix not in _OTHER_SUFFIXES:
            state = file.stat()
            if state.st_size <= _LARGEST:
                content = file.read_bytes()
            else:  # surely no tokenizer's, so only the same file is the same
                content = repr((file.resolve(), state.st_size, state.st_mtime_ns)).encode()
            digest.update(f"{file.relative_to(directory)} {len(content)} ".encode() + content)
    return digest.digest()


def _agrees(tokenizer: Any, directory: Path) -> bool:
    """Whether a tokenizer does with text what its `tokenizer.json` says. A class of transformers may not."""
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    for path in (file, directory / "tokenizer_config.json"):
        digest.update(path.read_bytes() if path.is_file() else b"")
    if digest.digest() in _proven:
        return True
    stated = Tokenizer.from_file(str(file))
    stated.no_truncation()  # a training run may have left them in the file; transformers switches them for each call
    stated.no_padding()
    special = "".join(token.content for _, token in sorted(stated.get_added_tokens_decoder().items()))[:400]
    for text in (*_PROBES, f"a {special} b"):
        wanted = stated.encode(text, add_special_tokens=False).ids
        if list(tokenizer(text, add_special_tokens=False).input_ids) != wanted:
            return False
        decoded = tokenizer.decode(wanted, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded != stated.decode(wanted, skip_special_tokens=False):
            return False
    _proven.add(digest.digest())
    return True


def _hidden(tokenizer: Any) -> dict[int, str]:
    """Tokens that decoding without special tokens leaves out."""
    found = {}
    for token in {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}:
        text = tokenizer.decode([token], skip_special_tokens=False)
        if text and not tokenizer.decode([token], skip_special_tokens=True):
            found[token] = str(tokenizer.convert_ids_to_tokens(token))
    return found


def _byte_tokens(tokenizer: Any) -> frozenset[int]:
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = [i for i in tokenizer.convert_tokens_to_ids(names) if i is not None]
    found = [i for i, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True) if name in names]
    spelt = any("<0x" in tokenizer.decode([i]) for i in found)  # plain tokens that look so
    return frozenset(() if spelt else found)


def _cleans_spaces(tokenizer: Any) -> bool:
    """Whether transformers' `decode` cleans up: it does not for BPE, whatever a configuration says."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return backend is None or forced or type(backend.model).__name__ != "BPE"


def _stated_ends(directory: Path) -> tuple[list[int], list[str]]:
    """The end tokens and stop texts that the configuration files name. What no file says is no default of a class.

    Raises:
        ConfigError: a file is damaged, or names something else than tokens.
    """
    found: list[int] = []
    stops: list[str] = []
    for file in (directory / "generation_config.json", directory / "config.json"):
        stated = read_json(file, ConfigError) if file.is_file() else {}
        text = stated.get("text_config")
        for where in (stated, text if isinstance(text, dict) else {}):
            value = where.get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(type(i) is not int for i in ids):
                raise ConfigError(f"{file}: eos_token_id: expected a token id or a list of them, found {value!r:.80}")
            found += ids
        value = stated.get("stop_strings")
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(f"{file}: stop_strings: expected a text or a list of them, found {value!r:.80}")
        stops += texts
    return found, stops


def _processor_template(directory: Path) -> Any:
    """The chat template of a multimodal model's processor, which tokenizers do not read."""
    file = directory / "chat_template.json"
    return read_json(file, ConfigError).get("chat_template") if file.is_file() else None


def _template_file(directory: Path) -> Path:
    """Where the chat template comes from."""
    if (directory / "chat_template.jinja").is_file():
        return directory / "chat_template.jinja"
    config = directory / "tokenizer_config.json"
    stated = config.is_file() and "chat_template" in read_json(config, ConfigError)
    return config if stated else directory / "chat_template.json"


def _check_is_text(file: Path) -> None:
    """Refuse a template that is not UTF-8: of transformers' error nobody would know which file it is about."""
    try:
        if file.is_file():
            file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _says(text: str, content: str) -> bool:
    """Whether a rendered conversation holds a message: its first and last words. Thoughts may be left out."""
    words = _WORDS.findall(content.rpartition("</think>")[2])
    return all(word in text for word in (*words[:8], *words[-8:]))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__

"""How one expert reads and speaks: tokenizer, chat template, end-of-sequence tokens, vocabulary, context length."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meswitch.errors import ConfigError

Message = dict[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]


class Voice:
    """Read from a checkpoint's or an artifact's directory.

    Raises:
        ConfigError: the directory has no tokenizer.
    """

    def __init__(self, name: str, directory: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        if not any((directory / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise ConfigError(
                f"{directory}: {name!r} has no tokenizer.json (nor tokenizer.model); "
                "copy the fine-tune's tokenizer files into its checkpoint and compress again"
            )
        self.name = name
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        config = AutoConfig.from_pretrained(directory)
        self.vocab_size: int = config.vocab_size
        self.max_length: int = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.eos = self._end_tokens(directory, config)

    def _end_tokens(self, directory: Path, config: Any) -> list[int]:
        file = directory / "generation_config.json"
        given = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        for candidate in (given, config.eos_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return [candidate] if isinstance(candidate, int) else list(candidate)
        return []

    def encode(self, prompt: Prompt) -> list[int]:
        """Text, chat messages (through the chat template) or token ids -> token ids.

        Raises:
            ConfigError: no chat template, a token id outside the vocabulary, or nothing at all.
        """
        if isinstance(prompt, str):
            tokens = self.tokenizer(prompt).input_ids
        elif prompt and isinstance(prompt[0], dict):
            if not self.tokenizer.chat_template:
                raise ConfigError(f"{self.name!r} has no chat template: send text to the completions API instead")
            try:
                text = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
            except Exception as error:
                raise ConfigError(f"messages: the chat template of {self.name!r} refuses them: {error}") from error
            tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        else:
            tokens = [int(token) for token in prompt]  # type: ignore[arg-type]
        if not tokens:
            raise ConfigError("prompt: it is empty")
        if not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise ConfigError(f"prompt: token ids of {self.name!r} lie between 0 and {self.vocab_size - 1}")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class Detokenizer:
    """Text from a growing list of tokens, a piece at a time; half a character waits for its rest."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._start = 0  # decoding restarts here: a few tokens of context keep the spaces right
        self._shown = 0

    def feed(self, tokens: Sequence[int], *, last: bool) -> str:
        """All tokens so far -> the text that is new."""
        before = self._voice.decode(tokens[self._start : self._shown])
        now = self._voice.decode(tokens[self._start :])
        if now.endswith("�") and not last:
            return ""
        self._start, self._shown = self._shown, len(tokens)
        return now[len(before) :]

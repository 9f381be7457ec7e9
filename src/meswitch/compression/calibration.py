"""Calibration text: a file of sequences, tokenised as the expert sees them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch.artifact.fingerprint import sha256_file
from meswitch.artifact.manifest import Calibration
from meswitch.errors import ConfigError

MAX_LENGTH = 512


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token id sequences and where they came from."""

    sequences: list[list[int]]
    info: Calibration


def load_calibration(file: str | Path, tokenizer_dir: str | Path, max_tokens: int = 32768) -> CalibrationSet:
    """Read calibration text and tokenise it with the expert's own tokenizer and chat template.

    Args:
        file: `.txt` (one sequence a line) or `.jsonl` (`{"text": ...}`, `{"messages": [...]}` or
            `{"prompt": ..., "completion": ...}` a line).
        max_tokens: sequences are taken in order until they hold this many tokens; each is cut at 512.

    Raises:
        ConfigError: no such file, a row that is none of these, or no text at all.
    """
    from transformers import AutoTokenizer

    file = Path(file)
    if not file.is_file():
        raise ConfigError(f"{file}: no such calibration file; give a .txt or .jsonl file, or `none`")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    sequences: list[list[int]] = []
    total = 0
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip() or total >= max_tokens:
            continue
        text, is_chat = _text(line, tokenizer, file, number)
        tokens = tokenizer(text, add_special_tokens=not is_chat).input_ids[: min(MAX_LENGTH, max_tokens - total)]
        if tokens:
            sequences.append(tokens)
            total += len(tokens)
    if not sequences:
        raise ConfigError(f"{file}: holds no text; calibration needs at least one sequence")
    return CalibrationSet(sequences, Calibration(file.name, sha256_file(file), len(sequences), total))


def _text(line: str, tokenizer: Any, file: Path, number: int) -> tuple[str, bool]:
    """The row's text, and whether the chat template has set the special tokens already."""
    if file.suffix != ".jsonl":
        return line, False
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{file}: line {number}: not valid JSON: {error}") from None
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            return tokenizer.apply_chat_template(row["messages"], tokenize=False), True
        if isinstance(row.get("prompt"), str):
            return row["prompt"] + str(row.get("completion", "")), False
        if isinstance(row.get("text"), str):
            return row["text"], False
    raise ConfigError(f"{file}: line {number}: needs one of the fields `text`, `messages` or `prompt`")

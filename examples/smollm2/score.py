"""What is left of an expert: right answers on the dev set, and KL from the full expert on the dev set's answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from meswitch.evaluate import Score, Text, answer, compare, divergences, gain_retained, total
from meswitch.evaluate.questions import prompt_ids
from tasks import Row, Task

RIGHT = ("n", "base", "full", "accuracy", "gain", "gain_low", "gain_high", "lost", "won", "p")  # see `compared`
ANSWER_CHARACTERS = 1200  # of an answer that KL is taken on


def load(checkpoint: Path, dtype: torch.dtype, device: str) -> Any:
    """A full model in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()


def outcomes(model: Any, tokenizer: Any, task: Task, rows: Sequence[Row], batch: int) -> tuple[bool, ...] | None:
    """Which questions the model answers right, greedily; None where there is no exact check."""
    if task.is_right is None:
        return None
    texts = answer(model, tokenizer, [row.question for row in rows], task.max_new_tokens, batch)
    return tuple(task.is_right(text, row.answer) for text, row in zip(texts, rows, strict=True))


def answers_of(tokenizer: Any, rows: Sequence[Row]) -> list[Text]:
    """The dev set's own answers, to compare what two models predict for each of their tokens and for the end."""
    found = []
    for row in rows:
        prompt = prompt_ids(tokenizer, row.question)
        ids = tokenizer(row.answer[:ANSWER_CHARACTERS], add_special_tokens=False)["input_ids"]
        found.append(Text((*prompt, *ids), len(prompt) - 1))  # a prompt's last token predicts the answer's first
    return found


def kl(model: Any, full: Any, texts: Sequence[Text]) -> float:
    """Mean KL(full || model) in nats a token."""
    return total(divergences(model, full, texts)).kl


def pack(found: Sequence[bool] | None) -> str | None:
    """Outcomes for a JSON file: `0110`."""
    return None if found is None else "".join("01"[one] for one in found)


def accuracy(found: str | None) -> float | None:
    """The share of right answers of packed outcomes."""
    return found.count("1") / len(found) if found else None


def compared(expert: str, compressed: str | None, full: str | None, base: str | None) -> dict[str, Any]:
    """A row's figures of right answers, paired by question; None where there is no exact check.

    `lost`: only the full expert was right; `won`: only the compressed one; `p`: McNemar's exact test of the two.
    `gain`: (compressed - base) / (full - base); `gain_low` and `gain_high`: its 95 % bootstrap interval.

    Args:
        compressed, full, base: packed outcomes of the same questions.
    """
    if compressed is None or full is None or base is None:
        return dict.fromkeys(RIGHT)
    ours, whole, start = (Score(expert, 0, tuple(one == "1" for one in some)) for some in (compressed, full, base))
    gain, pairs = gain_retained(ours, whole, start), compare(whole, ours)
    low, high = gain.interval or (None, None)
    values = (ours.total, start.accuracy, whole.accuracy, ours.accuracy, gain.value, low, high)
    return dict(zip(RIGHT, (*values, pairs.lost, pairs.gained, pairs.p_value), strict=True))

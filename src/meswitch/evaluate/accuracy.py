"""Ask a Hugging Face causal LM questions, greedily and in batches, and count right answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from meswitch.cpu import fitting_threads
from meswitch.errors import ConfigError
from meswitch.evaluate.fidelity import Text
from meswitch.evaluate.gain import Interval, wilson
from meswitch.evaluate.tasks import CHECKABLE, draw

MAX_NEW_TOKENS = 56


@dataclass(frozen=True, slots=True)
class Score:
    """How a model did on `draw(domain, n, seed)`: `outcomes[i]` says whether question `i` was answered right."""

    domain: str
    seed: int
    outcomes: tuple[bool, ...] = field(repr=False)

    @property
    def correct(self) -> int:
        return sum(self.outcomes)

    @property
    def total(self) -> int:
        return len(self.outcomes)

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval of the accuracy over questions of this kind."""
        return wilson(self.correct, self.total)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a one-turn chat, ready for the answer; the plain text where there is no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(prompt)["input_ids"])
    turn = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's EOS and those of the generation config."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    return sorted(i for i in ids | {tokenizer.eos_token_id} if i is not None)


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 256
) -> list[list[int]]:
    """Greedy answers as token ids, in the order of `prompts`, without the token that ended them.

    Prompts are batched by length, so that little of a batch is padding.
    """
    stops = stop_ids(model, tokenizer)
    pad = next((i for i in (tokenizer.pad_token_id, *stops) if i is not None), 0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops or None, pad_token_id=pad
    )
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = len(encoded[chosen[-1]])
        ids = torch.full((len(chosen), width), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):  # padded on the left: the answer follows the prompt directly
            ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, width - len(encoded[i]) :] = 1
        with fitting_threads(model.device, model.config.get_text_config().hidden_size):
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
        for i, row in zip(chosen, out[:, width:].tolist(), strict=True):
            end = next((position for position, token in enumerate(row) if token in stops), len(row))
            answers[i] = row[:end]
    return answers


def answer(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 256
) -> list[str]:
    """Greedy answers as text, in the order of `prompts`; special tokens are left out."""
    ids = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def own_answers(
    model: Any,
    tokenizer: Any,
    domain: str,
    n: int,
    seed: int,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 256,
) -> list[Text]:
    """Held-out conversations to measure fidelity on: prompts with the model's greedy answers, compared on those."""
    prompts = [question.prompt for question in draw(domain, n, seed)]
    answers = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    starts = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    # The prompt's last token predicts the answer's first.
    return [Text((*start, *answer), len(start) - 1) for start, answer in zip(starts, answers, strict=True) if start]


def accuracy(
    model: Any,
    tokenizer: Any,
    domain: str,
    n: int = 1000,
    seed: int = 2,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 256,
) -> Score:
    """Ask the `n` questions of `draw(domain, n, seed)` and check the answers.

    Raises:
        ConfigError: no such domain, or one whose answers cannot be checked.
    """
    if domain not in CHECKABLE:
        raise ConfigError(f"tasks: {domain!r} has no exact check; accuracy can be measured on {', '.join(CHECKABLE)}")
    questions = draw(domain, n, seed)
    texts = answer(model, tokenizer, [question.prompt for question in questions], max_new_tokens, batch_size)
    pairs = zip(questions, texts, strict=True)
    return Score(domain, seed, tuple(question.check is not None and question.check(text) for question, text in pairs))

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
from meswitch.evaluate.questions import Messages, Task

MAX_NEW_TOKENS = 256
Prompt = str | Messages


@dataclass(frozen=True, slots=True)
class Score:
    """How a model did on a task: `outcomes[i]` says whether question `i` was answered right.

    `questions` identifies them (`Task.identity`): only answers to the same ones are compared.
    """

    task: str
    questions: str | int
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


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a chat, ready for the answer; where there is no chat template, of a question's plain text.

    Raises:
        ConfigError: a conversation, and no chat template.
    """
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if len(prompt) == 1:
        return list(tokenizer(prompt[0]["content"])["input_ids"])
    raise ConfigError(
        f"questions: a conversation of {len(prompt)} turns needs a chat template, which this tokenizer does not have; "
        "write the rows as `prompt`"
    )


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's EOS and those of the generation config."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    return sorted(i for i in ids | {tokenizer.eos_token_id} if i is not None)


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 256
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
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 256
) -> list[str]:
    """Greedy answers as text, in the order of `prompts`; special tokens are left out."""
    ids = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]


def own_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 256,
) -> list[Text]:
    """Held-out conversations to measure fidelity on: prompts with the model's greedy answers, compared on those."""
    answers = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    starts = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    # The prompt's last token predicts the answer's first.
    return [Text((*start, *answer), len(start) - 1) for start, answer in zip(starts, answers, strict=True) if start]


def accuracy(
    model: Any, tokenizer: Any, task: Task, max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 256
) -> Score:
    """Ask a task's questions and check the answers.

    Raises:
        ConfigError: its answers cannot be checked.
    """
    if not task.is_checked:
        raise ConfigError(f"task {task.name}: its answers cannot be checked: there is fidelity only")
    texts = answer(model, tokenizer, [question.prompt for question in task.questions], max_new_tokens, batch_size)
    pairs = zip(task.questions, texts, strict=True)
    return Score(
        task.name,
        task.identity,
        tuple(question.check is not None and question.check(text) for question, text in pairs),
    )

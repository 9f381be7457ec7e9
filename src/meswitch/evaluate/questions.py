"""Questions of one's own: a file of rows, how a model is asked them, how a reply is told to be right, how sure that is.

A file has JSON lines (or a JSON list), gzipped or not. A row is

- `{"prompt": "...", "answer": ...}` (`question` is the same as `prompt`),
- `{"messages": [{"role": ..., "content": ...}, ...], "answer": ...}`: a conversation whose last user turn is asked. An
  assistant's turn at its end is not shown to the model; it is the answer if the row has none,
- `{"text": "..."}`: nothing is asked; models are compared on what they predict along the text.

Other fields are ignored. Without `answer` only the divergence from the full expert can be measured.

Of right and wrong answers statistics are made: how sure an accuracy (`wilson`), a gain retained (`gain_retained`) or a
difference (`compare`) is.
"""

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from transformers import GenerationConfig

from meswitch.cpu import fitting_threads
from meswitch.errors import ConfigError
from meswitch.evaluate.fidelity import Text
from meswitch.jsonfile import json_kind, read_json_rows

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages
Checker = Callable[[str, Any], bool]  # of a reply and the row's answer

MAX_NEW_TOKENS = 256  # of an answer
CHECKERS = ("exact", "number", "regex")
UNCHECKED = "none"
_NUMBER = re.compile(r"-?\d(?:[\d,]*\d)?(?:\.\d+)?")
_ASKED = ("prompt", "question", "messages")
Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


class Interval(NamedTuple):
    low: float
    high: float


class Outcomes(Protocol):
    """What is compared here: answers to the same questions in the same order (`Score` is one)."""

    @property
    def task(self) -> str: ...
    @property
    def questions(self) -> str | int: ...
    @property
    def outcomes(self) -> Sequence[bool]: ...


def wilson(correct: int, total: int) -> Interval:
    """95 % Wilson score interval of a proportion; sensible at 0 and at `total`, unlike the normal one."""
    if not 0 <= correct <= total or total == 0:
        raise ConfigError(f"wilson: {correct} of {total} is not a proportion; give 0 <= correct <= total, total >= 1")
    p, z2 = correct / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # The ends are exact where nothing or everything is right; rounding would leave them a hair off.
    return Interval(0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half)


@dataclass(frozen=True, slots=True)
class GainRetained:
    """`(compressed - base) / (expert - base)` of the accuracies, with what it was computed from.

    `value` and `interval` are None where the expert is no better than the base: there is no gain to retain.
    """

    value: float | None
    interval: Interval | None  # 95 %, paired bootstrap over the questions
    compressed: int  # right answers of each model, of `total`
    expert: int
    base: int
    total: int


def gain_retained(
    compressed: Outcomes, expert: Outcomes, base: Outcomes, resamples: int = 4000, seed: int = 0
) -> GainRetained:
    """How much of what fine-tuning gained is left after compression, on the same questions.

    Raises:
        ConfigError: the three were not asked the same questions.
    """
    total = _paired(compressed, expert, base)
    table = np.stack([np.asarray(score.outcomes, dtype=np.int64) for score in (compressed, expert, base)])
    c, e, b = (int(count) for count in table.sum(axis=1))
    if e <= b:
        return GainRetained(None, None, c, e, b, total)
    # A question falls in one of 8 cells (who answered it right), so resampling questions is drawing cell counts.
    cell = table[0] * 4 + table[1] * 2 + table[2]
    share = np.bincount(cell, minlength=8) / total
    drawn = np.random.default_rng(seed).multinomial(total, share, size=resamples)
    cs, es, bs = (drawn @ np.array([(i >> shift) & 1 for i in range(8)]) for shift in (2, 1, 0))
    kept = es > bs
    low, high = np.quantile((cs - bs)[kept] / (es - bs)[kept], [0.025, 0.975])
    return GainRetained((c - b) / (e - b), Interval(float(low), float(high)), c, e, b, total)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same questions: what the second lost and gained against the first."""

    both: int
    lost: int  # only the first was right
    gained: int  # only the second was right
    neither: int
    p_value: float  # exact McNemar test: how likely so uneven a split is if neither model is better


def compare(first: Outcomes, second: Outcomes) -> Comparison:
    """Paired comparison of two models by the questions they disagree on.

    Raises:
        ConfigError: the two were not asked the same questions.
    """
    total = _paired(first, second)
    pairs = list(zip(first.outcomes, second.outcomes, strict=True))
    both, lost, gained = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
    return Comparison(both, lost, gained, total - both - lost - gained, _mcnemar(lost, gained))


def _mcnemar(lost: int, gained: int) -> float:
    """Two-sided binomial probability of a split at least as uneven, from exact integers."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return min(1.0, (2 * tail) / 2**n)


def _paired(*scores: Outcomes) -> int:
    asked = {(score.task, str(score.questions), len(score.outcomes)) for score in scores}
    if len(asked) > 1:
        said = "; ".join(f"{n} of {task} ({questions:.12})" for task, questions, n in sorted(asked))
        raise ConfigError(f"scores: not the same questions: {said}; ask all models the same")
    return len(scores[0].outcomes)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and whether a reply is right.

    Args:
        prompt: a user's message, or a conversation whose last turn is one.
        check: of a reply; None if only the divergence is measured.
    """

    prompt: str | Messages
    check: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Questions, or texts, that models are compared on.

    Args:
        name: in the report.
        questions: all with a check, or all without.
        texts: to compare predictions along; then there are no questions.
        expert: the only expert that is asked; None asks all.
        identity: tells these questions from others; two models can be paired only if they had the same.
    """

    name: str
    questions: tuple[Question, ...] = ()
    texts: tuple[str, ...] = ()
    expert: str | None = None
    identity: str | int = ""

    @property
    def is_checked(self) -> bool:
        """Whether accuracy can be measured."""
        return bool(self.questions) and self.questions[0].check is not None


def read_task(
    file: str | Path,
    checker: str | Checker | None = None,
    *,
    name: str | None = None,
    expert: str | None = None,
    limit: int | None = None,
) -> Task:
    """The task of a file of rows.

    Args:
        file: JSON lines or a JSON list, see the module.
        checker: `exact`, `number`, `regex`, `FILE.py:FUNCTION`, or a function of a reply and the row's answer; `none`
            measures the divergence alone. None is right for rows without answers only.
        name: of the task; the file's name without its ending, if left out.
        expert: the only one to ask.
        limit: read the first so many rows.

    Raises:
        ConfigError: the file cannot be read, a row has none of the forms or another form than the first, or the checker
            does not fit it.
    """
    path = Path(file)
    check = None if checker in (None, UNCHECKED) else find_checker(checker)
    questions: list[Question] = []
    texts: list[str] = []
    digest = hashlib.sha256()
    for place, row in read_json_rows(path):
        if limit is not None and len(questions) + len(texts) >= limit:
            break
        where = f"{path}: {place}"
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: is {json_kind(row)}; a row is an object with one of {', '.join(_ASKED)}, text")
        digest.update(json.dumps(row, sort_keys=True).encode())
        if not any(field in row for field in _ASKED) and isinstance(row.get("text"), str):
            texts.append(row["text"])
            continue
        prompt, answer = _question(row, where)
        if check is None and answer is not None and checker is None:
            raise ConfigError(
                f"{where}: answer: how is it checked? give --checker {', '.join(CHECKERS)} or FILE.py:FUNCTION; "
                f"`{UNCHECKED}` ignores answers and measures KL alone"
            )
        if check is not None and answer is None:
            raise ConfigError(f"{where}: answer: missing; the checker {checker} compares the reply with it")
        questions.append(Question(prompt, None if check is None else _bound(check, answer, where)))
    if questions and texts:
        raise ConfigError(f"{path}: some rows have `text`, others a question; put them into two files")
    if not questions and not texts:
        raise ConfigError(f"{path}: has no rows; give at least one")
    if texts and check is not None:
        raise ConfigError(f"{path}: its rows are texts without questions; leave the checker out")
    plain = path.name.removesuffix(".gz")
    return Task(name or Path(plain).stem, tuple(questions), tuple(texts), expert, digest.hexdigest())


def find_checker(checker: str | Checker) -> Checker:
    """A checker by name, or the function of a Python file.

    Raises:
        ConfigError: there is none of this name, or the file or function cannot be loaded.
    """
    if callable(checker):
        return checker
    known: dict[str, Checker] = {"exact": _exact, "number": _number, "regex": _regex}
    if checker in known:
        return known[checker]
    file, _, function = checker.rpartition(":")
    if not file.endswith(".py"):
        raise ConfigError(f"checker: {checker!r} is none of {', '.join(CHECKERS)}, {UNCHECKED} or FILE.py:FUNCTION")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"checker: {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"meswitch_checker_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"checker: {path}: cannot be loaded ({type(error).__name__}: {error})") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"checker: {path}: has no function {function!r}; it takes a reply and the row's answer")
    return found


def _question(row: Mapping[str, Any], where: str) -> tuple[str | Messages, Any]:
    """What is asked, and the answer; None if the row has none."""
    field = next((name for name in _ASKED if name in row), None)
    if field is None:
        raise ConfigError(f"{where}: needs one of the fields {', '.join(_ASKED)}, text; it has {', '.join(row)}")
    prompt, answer = row[field], row.get("answer")
    if field != "messages":
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"{where}: {field}: expected a text, found {json_kind(prompt)}")
        return prompt, answer
    fits = isinstance(prompt, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in prompt
    )
    if not fits:
        raise ConfigError(f"{where}: messages: expected a list of objects with a text as `role` and as `content`")
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    if turns and turns[-1]["role"] == "assistant":
        last = turns.pop()["content"]
        answer = last if answer is None else answer
    if not turns or turns[-1]["role"] != "user":
        raise ConfigError(f"{where}: messages: the last turn that is asked must be a user's")
    return turns, answer


def _bound(check: Checker, answer: Any, where: str) -> Callable[[str], bool]:
    """The check of one row. Ours are tried once, so that an answer that they cannot take is named before any work."""

    def right(reply: str) -> bool:
        try:
            return bool(check(reply, answer))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        except Exception as error:  # a checker of the user's own
            raise ConfigError(
                f"{where}: the checker raised {type(error).__name__} ({error}) on the reply {reply!r:.200}"
            ) from error

    if check in (_exact, _number, _regex):
        right("")
    return right


def _exact(reply: str, answer: Any) -> bool:
    """Equal but for blanks around it; to one of them, if the answer is a list."""
    accepted = answer if isinstance(answer, list) else [answer]
    for one in accepted:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise ConfigError(f"answer: expected a text, a number or a list of them, found {json_kind(one)}")
    return reply.strip() in {str(one).strip() for one in accepted}


def _number(reply: str, answer: Any) -> bool:
    """The last number of the reply is the answer's last number: `... so he pays #### 1,250.` is 1250."""
    wanted = _last_number(str(answer)) if isinstance(answer, str | int | float) else None
    if wanted is None:
        raise ConfigError(f"answer: {answer!r} has no number")
    found = _last_number(reply)
    return found is not None and math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _regex(reply: str, answer: Any) -> bool:
    """The answer is a regular expression that is found somewhere in the reply."""
    if not isinstance(answer, str):
        raise ConfigError(f"answer: expected a regular expression, found {json_kind(answer)}")
    try:
        return re.search(answer, reply) is not None
    except re.error as error:
        raise ConfigError(f"answer: {answer!r} is no regular expression ({error})") from None


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

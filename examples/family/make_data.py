"""Make the data files of this directory: `calibration/*.jsonl`, `questions/*.jsonl` and `routing.jsonl`.

    python examples/family/make_data.py

Everything is synthetic: the questions of `meswitch_lab.toy`, the templates of `routing_templates.toml`, and
for the calibration of sql what the sql expert itself answers. It is deterministic: a second run writes the same
files (the answers of the sql expert can differ where float32 arithmetic does).

Seeds: 1 trained the experts; 1001 (calibration), 1002 and 1003 (routing) are used here; 0 and 2 to 99 are left for
evaluation, 2 for `questions`.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch.evaluate import answer
from meswitch_lab.toy import CHECKABLE, DOMAINS, draw

HERE = Path(__file__).resolve().parent
QUESTIONS_SEED, CALIBRATION_SEED, ROUTING_SEED, TEMPLATE_SEED = 2, 1001, 1002, 1003
QUESTION_ROWS = 500
CALIBRATION_ROWS = 8192
TASK_ROWS, TEMPLATE_ROWS, OTHER_ROWS = 125, 225, 200  # sql has no templates here, so it gets 350 from tasks


def calibration(domain: str) -> Iterator[dict[str, Any]]:
    """Conversations of one question and one answer, as the expert would write them."""
    questions = draw(domain, CALIBRATION_ROWS, CALIBRATION_SEED)
    prompts = [question.prompt for question in questions]
    if domain in CHECKABLE:
        replies = [str(question.response) for question in questions]
    else:
        model = AutoModelForCausalLM.from_pretrained(HERE / domain, dtype=torch.float32)
        replies = answer(model, AutoTokenizer.from_pretrained(HERE / domain), prompts)
    for prompt, reply in zip(prompts, replies, strict=True):
        yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


def questions(domain: str) -> Iterator[dict[str, Any]]:
    """What `meswitch eval` asks; without answers where there is no exact check."""
    for question in draw(domain, QUESTION_ROWS, QUESTIONS_SEED):
        yield {"prompt": question.prompt} | ({"answer": question.response} if question.response else {})


def routing() -> Iterator[dict[str, str]]:
    """Queries and the domain that should answer them, shuffled; every query once."""
    templates = tomllib.loads((HERE / "routing_templates.toml").read_text())
    slots = templates.pop("slots")
    rows = []
    for domain in DOMAINS:
        count = TASK_ROWS if domain in templates else TASK_ROWS + TEMPLATE_ROWS
        prompts = dict.fromkeys(question.prompt for question in draw(domain, 4 * count, ROUTING_SEED))
        rows += [{"query": prompt, "domain": domain, "source": "tasks"} for prompt in list(prompts)[:count]]
    for domain, section in templates.items():
        count = TEMPLATE_ROWS if domain in DOMAINS else OTHER_ROWS
        texts = distinct(section["templates"], slots, count, Random(f"{domain}-{TEMPLATE_SEED}"))
        rows += [{"query": text, "domain": domain, "source": "templates"} for text in texts]
    Random(TEMPLATE_SEED).shuffle(rows)
    yield from rows


def distinct(templates: list[str], slots: dict[str, list[str]], count: int, random: Random) -> list[str]:
    """`count` different texts, each template used about equally often."""

    def fill(match: re.Match[str]) -> str:
        low, dash, high = match[1].partition("-")
        return str(random.randint(int(low), int(high))) if dash else random.choice(slots[match[1]])

    texts: dict[str, None] = {}
    tries = 0
    while len(texts) < count:
        texts[re.sub(r"\{([a-z]+|\d+-\d+)\}", fill, templates[tries % len(templates)])] = None
        tries += 1
        if tries > 50 * count:
            raise SystemExit(f"routing_templates.toml gives only {len(texts)} different texts; {count} are wanted")
    return list(texts)


def write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path.relative_to(HERE)}: {len(lines)} rows")


if __name__ == "__main__":
    for name in DOMAINS:
        write(HERE / "calibration" / f"{name}.jsonl", calibration(name))
        write(HERE / "questions" / f"{name}.jsonl", questions(name))
    write(HERE / "routing.jsonl", routing())

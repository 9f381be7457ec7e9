"""A full fine-tune: float32 weights, bfloat16 arithmetic, AdamW, a cosine, loss on the answers only."""

import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch.checkpoint import COMPANION_FILES
from meswitch.durable import replace_directory
from meswitch.evaluate.questions import prompt_ids
from tasks import Row

MAX_LENGTH = 640  # longer rows are left out
SORTED = 2048  # rows that are sorted by length together
MOST_ROWS = 64
PART_TOKENS = 8192  # padded tokens that are in memory at once
WARMUP = 0.03  # share of the steps


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the weights. step_tokens: padded tokens of a step, at most."""

    epochs: float
    learning_rate: float
    max_steps: int | None = None
    step_tokens: int = 24576
    weight_decay: float = 0.01
    seed: int = 0


class Example(NamedTuple):
    """Token ids; the loss counts those of the answer."""

    prompt: list[int]
    answer: list[int]


def encode(tokenizer: Any, rows: Sequence[Row]) -> list[Example]:
    """Rows as chats of one turn, each answer with its end token; without those that are too long."""
    answers = tokenizer([row.answer for row in rows], add_special_tokens=False)["input_ids"]
    found = [
        Example(prompt_ids(tokenizer, row.question), [*answer, tokenizer.eos_token_id])
        for row, answer in zip(rows, answers, strict=True)
    ]
    return [example for example in found if sum(map(len, example)) <= MAX_LENGTH]


def batches(lengths: Sequence[int], step_tokens: int, rng: random.Random) -> list[list[int]]:
    """One epoch: the examples' numbers in batches of similar length, in random order."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    found: list[list[int]] = []
    for start in range(0, len(order), SORTED):
        batch: list[int] = []
        for i in sorted(order[start : start + SORTED], key=lengths.__getitem__):  # so the last is the longest
            if batch and (lengths[i] * (len(batch) + 1) > step_tokens or len(batch) == MOST_ROWS):
                found.append(batch)
                batch = []
            batch.append(i)
        found.append(batch)
    rng.shuffle(found)
    return found


def plan(lengths: Sequence[int], recipe: Recipe) -> list[list[int]]:
    """The batch of every step; the last epoch may be a part of one."""
    rng, left, found = random.Random(recipe.seed), recipe.epochs, list[list[int]]()
    while left > 0:
        epoch = batches(lengths, recipe.step_tokens, rng)
        found += epoch[: math.ceil(len(epoch) * min(1, left))]
        left -= 1
    return found[: recipe.max_steps]


def rate(done: float) -> float:
    """The share of the learning rate after a share of the steps."""
    return done / WARMUP if done < WARMUP else 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def padded(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Ids, [batch, length], and whether each is an answer's. Padded on the right, so causality hides it."""
    shape = len(examples), max(sum(map(len, example)) for example in examples)
    ids, counted = torch.full(shape, pad), torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        counted[row, len(prompt) : end] = True
    return ids, counted


def parts(batch: Sequence[Example]) -> list[list[Example]]:
    """A step's examples, as many at a time as fit into memory."""
    longest = max(sum(map(len, example)) for example in batch)
    size = max(1, PART_TOKENS // longest)
    return [list(batch[start : start + size]) for start in range(0, len(batch), size)]


def answers_loss(model: Any, ids: Tensor, counted: Tensor) -> Tensor:
    """Sum of the cross-entropy of the answers' tokens; logits are made for them only."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, :-1][counted[:, 1:]])
    return F.cross_entropy(logits.float(), ids[:, 1:][counted[:, 1:]], reduction="sum")


def backward(model: Any, batch: Sequence[Example], pad: int, device: str) -> Tensor:
    """Add a step's gradients; the mean loss of its answers' tokens."""
    tokens = sum(len(example.answer) for example in batch)
    mean = torch.zeros((), device=device)
    for part in parts(batch):
        ids, counted = padded(part, pad)
        with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):  # most CPUs are slower in it
            loss = answers_loss(model, ids.to(device), counted.to(device)) / tokens
        loss.backward()
        mean += loss.detach()
    return mean


def train(
    base: Path, rows: Sequence[Row], out: Path, recipe: Recipe, device: str, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Fine-tune and write the checkpoint in bfloat16, with the base's other files.

    Returns:
        the recipe, the steps, the last loss, the seconds, and how far the block projections moved.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("proj.weight")}
    examples = encode(tokenizer, rows)
    steps = plan([sum(map(len, example)) for example in examples], recipe)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=device != "cpu",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step / len(steps)))
    started, loss = time.perf_counter(), torch.zeros(())
    for step, batch in enumerate(steps):
        loss = backward(model, [examples[i] for i in batch], tokenizer.eos_token_id, device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 100 == 0:
            say(f"{out.name}: step {step}/{len(steps)}, loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s")
    model.to(torch.bfloat16)
    moved = [
        ((p.float() - before[name]).norm() / before[name].norm()).item()
        for name, p in model.named_parameters()
        if name in before
    ]
    write_expert(model, base, out)
    return {
        **asdict(recipe),
        "rows": len(examples),
        "steps": len(steps),
        "loss": loss.item(),
        "relative_norm": sum(moved) / len(moved),
        "seconds": time.perf_counter() - started,
    }


def write_expert(model: Any, base: Path, out: Path) -> None:
    """The checkpoint, whole or not there; everything but weights is the base's."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for name in COMPANION_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, partial / name)
    replace_directory(partial, out)

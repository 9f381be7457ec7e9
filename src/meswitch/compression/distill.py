"""Distillation: train a compressed expert so that it says what the full one says.

BitDelta (arXiv 2402.10193, section 3.1) and ME-Switch (2406.09041) train scales end to end on logits, with fixed codes.
Ours, unless a method's published recipe says otherwise (`compression.recipe`): codes are trained with their scales,
salient weights and norms (`compression.trainable`); the loss is the KL divergence from the full expert and the relative
error of every block's output; what the user says counts less than what the assistant answers. Ours with every recipe:
the state of least divergence on held-out text is kept. It needs both models in memory, unlike the rest of compression.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meswitch.artifact import Artifact
from meswitch.artifact.manifest import Distillation
from meswitch.checkpoint import Checkpoint
from meswitch.codec import CodedDelta, PackedDelta
from meswitch.compression.calibration import CalibrationSet
from meswitch.compression.recipe import Recipe
from meswitch.compression.student import Said, build, frozen, read_batch
from meswitch.compression.trainable import Group
from meswitch.compression.walk import compute_dtype
from meswitch.errors import ConfigError

# (steps done, steps in all, a line with the losses)
Progress = Callable[[int, int, str], None]

HELD_OUT = 128  # sequences at most
FLOAT32_PARAMETERS = 1 << 30
HELD_OUT_BATCH = 16
_WARM_UP = 10  # steps
_POOL = 8  # batches that are sorted by length together


def check_text(sequences: list[list[int]]) -> None:
    """Refuse text too short to train on and to hold a part out.

    Raises:
        ConfigError: fewer than 10 sequences.
    """
    if len(sequences) < 10:
        raise ConfigError(f"distill: {len(sequences)} calibration sequences are too few; give at least 10")


def train(
    base: Checkpoint,
    expert: Checkpoint,
    artifact: Artifact,
    text: CalibrationSet,
    recipe: Recipe,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[dict[str, PackedDelta | CodedDelta | Tensor], Distillation]:
    """Train an artifact's codes and scales, and what else the recipe says, on text.

    Returns:
        the tensors that changed, by name, and what was done. Held-out divergence never rises: if training does not
        help, the start is returned.

    Raises:
        ConfigError: fewer than 10 sequences, or a method that has nothing to train. IncompatibleError: the model has
            other layers than the artifact.
    """
    check_text(text.sequences)
    # bfloat16 rounds away what a step changes; only where float32 would not fit is it worth that
    dtype = torch.float32 if expert.parameters <= FLOAT32_PARAMETERS else compute_dtype(device)
    teacher = frozen(expert, device, dtype)
    student = build(base, expert, artifact, recipe, device, dtype)
    generator = torch.Generator().manual_seed(recipe.seed)
    held, rest = split(text, recipe, generator)

    def told(step: int, now: float, before: float) -> None:
        if progress is not None:
            progress(step, recipe.steps, f"held-out divergence {now:.4f} nats a token, {before:.4f} before")

    before, best = fit(
        student.groups(),
        batches(rest, recipe.batch, generator),
        lambda batch: _loss(teacher, student.model, batch, recipe, device).backward(),
        lambda: _held_out(teacher, student.model, held, recipe, device),
        recipe,
        told,
    )
    info = Distillation(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        batch=recipe.batch,
        seed=recipe.seed,
        held_out_before=round(before, 6),
        held_out_after=round(best, 6),
        loss=recipe.loss,
        codes=recipe.codes and any(entry.kind == "packed" for entry in artifact.manifest.tensors.values()),
        norms=recipe.norms,
        hidden=recipe.hidden,
        question_weight=recipe.question_weight,
    )
    return student.trained(artifact), info


def fit(
    groups: list[Group],
    text: Iterator[Any],
    learn: Callable[[Any], object],
    held_out: Callable[[], float],
    recipe: Recipe,
    told: Callable[[int, float, float], None],
) -> tuple[float, float]:
    """Train parameters and leave them in the state that was best on held-out text.

    Args:
        text: batches without end. learn: leaves a batch's gradients in the parameters. held_out: what is to fall.
        told: after every look at the held-out text: steps done, its value now and before the first step.

    Returns:
        the held-out value before the first step, and the best.
    """
    trained = [parameter for parameters, _ in groups for parameter in parameters]
    before = best = held_out()
    if not trained:
        return before, best
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": recipe.learning_rate * factor} for parameters, factor in groups
    ]
    optimizer = torch.optim.AdamW(settings, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe.steps))
    kept = [p.detach().clone() for p in trained]
    for step in range(1, recipe.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        learn(next(text))
        optimizer.step()
        schedule.step()
        if step % recipe.check_every == 0 or step == recipe.steps:
            now = held_out()
            if now < best:
                best, kept = now, [p.detach().clone() for p in trained]
            told(step, now, before)
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return before, best


def split(text: CalibrationSet, recipe: Recipe, generator: torch.Generator) -> tuple[list["Sample"], list["Sample"]]:
    """A held-out tenth, and the rest, which is trained on."""
    samples = [
        Sample(ids, start, number)
        for number, (ids, start) in enumerate(zip(text.sequences, text.known_starts, strict=True))
    ]
    order = torch.randperm(len(samples), generator=generator).tolist()
    count = min(max(1, len(order) // 10), HELD_OUT)
    return [samples[i] for i in order[:count]], [samples[i].cut(recipe.length) for i in order[count:]]


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids, where the assistant's last turn starts (0: all of it counts in full), and its place in the text."""

    ids: list[int]
    start: int
    number: int

    def cut(self, length: int | None) -> "Sample":
        return self if length is None else Sample(self.ids[:length], self.start, self.number)

    def weights(self, question: float) -> list[float]:
        """What each position counts: position `i` predicts token `i + 1`."""
        asked = min(max(0, self.start - 1), len(self.ids))
        return [question] * asked + [1.0] * (len(self.ids) - asked)


def batches(samples: list[Sample], size: int, generator: torch.Generator) -> Iterator[list[Sample]]:
    """Batches without end, every sample once before any comes again; of similar lengths, so that little is padding."""
    pool: list[Sample] = []
    while True:
        while len(pool) < size * _POOL:
            pool += [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
        chosen, pool = sorted(pool[: size * _POOL], key=lambda sample: len(sample.ids)), pool[size * _POOL :]
        for at in torch.randperm(_POOL, generator=generator).tolist():
            yield chosen[at * size : (at + 1) * size]


def rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def _loss(teacher: Any, student: Any, batch: list[Sample], recipe: Recipe, device: torch.device) -> Tensor:
    ids = [sample.ids for sample in batch]
    with torch.no_grad():
        wanted = read_batch(teacher, ids, device, hidden=recipe.hidden > 0)
    found = read_batch(student, ids, device, hidden=recipe.hidden > 0)
    if recipe.loss == "mse":
        return F.mse_loss(found.logits, wanted.logits)
    weight = weights(batch, recipe.question_weight, device)
    loss = (_divergence(wanted, found) * weight).sum()
    padded = torch.zeros(found.real.shape, device=device).masked_scatter_(found.real, weight)
    for theirs, ours in zip(wanted.hidden, found.hidden, strict=True):
        missed, power = ((ours - theirs).float().square().sum(-1), theirs.float().square().sum(-1))
        loss = loss + recipe.hidden / len(found.hidden) * (missed * padded).sum() / (power * padded).sum()
    return loss


def weights(batch: list[Sample], question: float, device: torch.device) -> Tensor:
    """[tokens], of sum 1."""
    weight = torch.tensor([w for sample in batch for w in sample.weights(question)], device=device)
    return weight / weight.sum()


def _divergence(wanted: Said, found: Said) -> Tensor:
    """KL(teacher || student) in nats at every token."""
    both = found.logits.log_softmax(-1), wanted.logits.log_softmax(-1)
    return F.kl_div(*both, log_target=True, reduction="none").sum(-1)


@torch.no_grad()
def _held_out(teacher: Any, student: Any, held: list[Sample], recipe: Recipe, device: torch.device) -> float:
    """Mean divergence, weighed as in training."""
    total = mass = 0.0
    for start in range(0, len(held), HELD_OUT_BATCH):
        part = held[start : start + HELD_OUT_BATCH]
        ids = [sample.ids for sample in part]
        divergence = _divergence(read_batch(teacher, ids, device), read_batch(student, ids, device))
        count = sum(sum(sample.weights(recipe.question_weight)) for sample in part)
        total += float((divergence * weights(part, recipe.question_weight, device)).sum()) * count
        mass += count
    return total / mass

"""Distillation: train a compressed expert so that it says what the full one says.

BitDelta (arXiv 2402.10193, section 3.1) and ME-Switch (2406.09041) train scales end to end on logits, with fixed codes.
Ours, unless a method's published recipe says otherwise (`compression.recipe`): codes are trained with their scales,
salient weights and norms (`compression.trainable`); the loss is the KL divergence from the full expert and the relative
error of every block's output; what the user says counts less than what the assistant answers. Ours with every recipe:
the state of least divergence on held-out text is kept. It needs both models in memory, unlike the rest of compression.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meswitch.artifact import Artifact
from meswitch.artifact.manifest import Distillation
from meswitch.checkpoint import Checkpoint
from meswitch.codec import CodedDelta, PackedDelta
from meswitch.compression.calibration import CalibrationSet
from meswitch.compression.divergence import divergence
from meswitch.compression.recipe import Recipe
from meswitch.compression.samples import Sample, batches, check_text, mean, split, weights
from meswitch.compression.student import Said, build, frozen, read_batch
from meswitch.compression.trainable import Group
from meswitch.compression.walk import compute_dtype

# (steps done, steps in all, a line with the losses)
Progress = Callable[[int, int, str], None]

_FLOAT32_PARAMETERS = 1 << 30
_WARM_UP = 10  # steps
_REMEMBERED = 1 << 28  # bytes of logits


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
    dtype, question = training_dtype(expert, device), recipe.question_weight
    teacher = frozen(expert, device, dtype)
    student = build(base, expert, artifact, recipe, device, dtype)
    generator = torch.Generator().manual_seed(recipe.seed)
    held, rest = split(text, recipe, generator)

    def told(step: int, now: float, before: float) -> None:
        if progress is not None:
            progress(step, recipe.steps, f"held-out divergence {now:.4f} nats a token, {before:.4f} before")

    full = _Remembering(teacher, sum(len(sample.ids) for sample in held), device)
    before, best = fit(
        student.groups(),
        batches(rest, recipe.batch, generator),
        lambda batch: _loss(teacher, student.model, batch, recipe, device).backward(),
        lambda: mean(held, question, lambda batch: _divergence(full, student.model, batch, question, device)),
        recipe,
        told,
    )
    return student.trained(artifact), record(artifact, recipe, before, best)


def record(artifact: Artifact, recipe: Recipe, before: float, after: float) -> Distillation:
    """What the manifest says of a training: the recipe as it applied, held-out divergence before and after."""
    return Distillation(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        batch=recipe.batch,
        seed=recipe.seed,
        held_out_before=round(before, 6),
        held_out_after=round(after, 6),
        loss=recipe.loss,
        codes=recipe.codes and any(entry.kind == "packed" for entry in artifact.manifest.tensors.values()),
        norms=recipe.norms,
        hidden=recipe.hidden if recipe.scope == "model" else 0.0,
        question_weight=recipe.question_weight,
        scope=recipe.scope,
    )


def training_dtype(expert: Checkpoint, device: torch.device) -> torch.dtype:
    """bfloat16 rounds away what a step changes; only where float32 would not fit is it worth that."""
    return torch.float32 if expert.parameters <= _FLOAT32_PARAMETERS else compute_dtype(device)


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
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
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


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def _loss(teacher: Any, student: Any, batch: list[Sample], recipe: Recipe, device: torch.device) -> Tensor:
    ids = [sample.ids for sample in batch]
    with torch.inference_mode():
        wanted = read_batch(teacher, ids, device, hidden=recipe.hidden > 0)
    found = read_batch(student, ids, device, hidden=recipe.hidden > 0)
    if recipe.loss == "mse":
        return F.mse_loss(found.logits[found.real], wanted.logits[found.real])
    weight = torch.zeros(found.real.shape, device=device)
    weight.masked_scatter_(found.real, weights(batch, recipe.question_weight, device))
    loss = (divergence(wanted.logits, found.logits) * weight).sum()
    for theirs, ours in zip(wanted.hidden, found.hidden, strict=True):
        missed, power = ((ours - theirs).float().square().sum(-1), theirs.float().square().sum(-1))
        loss = loss + recipe.hidden / len(found.hidden) * (missed * weight).sum() / (power * weight).sum()
    return loss


class _Remembering:
    """The full expert's answers to held-out text, kept from one look to the next where they take few bytes."""

    def __init__(self, teacher: Any, tokens: int, device: torch.device) -> None:
        self._teacher, self._device = teacher, device
        self._keeps = tokens * teacher.config.vocab_size * 4 <= _REMEMBERED
        self._kept: dict[int, Said] = {}

    def read(self, batch: list[Sample]) -> Said:
        """batch: always the same that begins with this sample."""
        number = batch[0].number
        said = self._kept.get(number) or read_batch(self._teacher, [sample.ids for sample in batch], self._device)
        if self._keeps:
            self._kept[number] = said
        return said


@torch.inference_mode()
def _divergence(full: _Remembering, student: Any, batch: list[Sample], question: float, device: torch.device) -> float:
    wanted, found = full.read(batch), read_batch(student, [sample.ids for sample in batch], device)
    return float((divergence(wanted.logits, found.logits)[found.real] * weights(batch, question, device)).sum())

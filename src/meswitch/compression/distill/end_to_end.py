"""Distillation: train a compressed expert so that it says what the full one says.

BitDelta (arXiv 2402.10193, section 3.1) and ME-Switch (2406.09041) train scales end to end on logits, with fixed codes.
Ours, unless a method's published recipe says otherwise (`recipe`): codes are trained with their scales, salient weights
and norms (`student`); the loss is the KL divergence from the full expert and the relative error of every block's
output; what the user says counts less than what the assistant answers. Ours with every recipe: the state of least
divergence on held-out text is kept. It needs both models in memory, unlike the rest of compression.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrize import cached

from meswitch.artifact import Artifact
from meswitch.artifact.manifest import Distillation
from meswitch.checkpoint import Checkpoint
from meswitch.codec import CodedDelta, LowRankDelta, PackedDelta
from meswitch.compression.distill.student import Outputs, build_student, frozen, read_batch
from meswitch.compression.distill.training import (
    STEP_TOKENS,
    Sample,
    batches,
    check_text,
    divergence,
    fit,
    mean,
    record,
    split,
    training_dtype,
    training_plan,
    weights,
)
from meswitch.compression.options import Recipe
from meswitch.compression.saved_work import NOWHERE, SavedWork
from meswitch.compression.text import CalibrationSet
from meswitch.progress import Progress, silent

_REMEMBERED = 1 << 28  # bytes of logits


def train_end_to_end(
    base: Checkpoint,
    expert: Checkpoint,
    artifact: Artifact,
    text: CalibrationSet,
    recipe: Recipe,
    *,
    device: torch.device,
    progress: Progress = silent,
    work: SavedWork = NOWHERE,
) -> tuple[dict[str, PackedDelta | LowRankDelta | CodedDelta | Tensor], Distillation]:
    """Train an artifact's codes and scales, and what else the recipe says, on text.

    Args:
        work: where the state of the training is saved now and then, and found again.

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
    student = build_student(base, expert, artifact, recipe, device, dtype)
    generator = torch.Generator().manual_seed(recipe.seed)
    held, rest = split(text, recipe, generator)

    def told(step: int, now: float, before: float) -> None:
        progress("training", step, recipe.steps, f"held-out divergence {now:.4f} nats a token, {before:.4f} before")

    full = _TeacherAnswers(teacher, sum(len(sample.ids) for sample in held), device)
    before, best = fit(
        student.groups(),
        batches(rest, recipe.batch, generator),
        lambda batch: _learn(teacher, student.model, batch, recipe, device),
        lambda: mean(held, question, lambda batch: _divergence(full, student.model, batch, question, device)),
        recipe,
        told,
        work,
        training_plan(artifact, text, recipe, device),
    )
    return student.trained(artifact), record(artifact, recipe, before, best)


def _learn(teacher: Any, student: Any, batch: list[Sample], recipe: Recipe, device: torch.device) -> None:
    """Leave a batch's gradients in the student's parameters: a few sequences at a time, which bounds the memory."""
    longest = max(len(sample.ids) for sample in batch)
    few = max(1, STEP_TOKENS // longest)
    parts = [batch[start : start + few] for start in range(0, len(batch), few)]
    mass = [sum(sum(sample.weights(recipe.question_weight)) for sample in part) for part in parts]
    with cached():  # the matrices are made once for all parts
        for part, own in zip(parts, mass, strict=True):
            loss = _loss(teacher, student, part, recipe, device)
            (loss * (own / sum(mass))).backward(retain_graph=part is not parts[-1])


def _loss(teacher: Any, student: Any, batch: list[Sample], recipe: Recipe, device: torch.device) -> Tensor:
    ids = [sample.ids for sample in batch]
    with torch.no_grad():
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


class _TeacherAnswers:
    """The full expert's answers to held-out text, kept from one look to the next where they take few bytes."""

    def __init__(self, teacher: Any, tokens: int, device: torch.device) -> None:
        self._teacher, self._device = teacher, device
        self._keeps = tokens * teacher.config.get_text_config().vocab_size * 4 <= _REMEMBERED
        self._kept: dict[int, Outputs] = {}

    def read(self, batch: list[Sample]) -> Outputs:
        """batch: always the same that begins with this sample."""
        number = batch[0].number
        said = self._kept.get(number) or read_batch(self._teacher, [sample.ids for sample in batch], self._device)
        if self._keeps:
            self._kept[number] = said
        return said


@torch.inference_mode()
def _divergence(
    full: _TeacherAnswers, student: Any, batch: list[Sample], question: float, device: torch.device
) -> float:
    wanted, found = full.read(batch), read_batch(student, [sample.ids for sample in batch], device)
    return float((divergence(wanted.logits, found.logits)[found.real] * weights(batch, question, device)).sum())

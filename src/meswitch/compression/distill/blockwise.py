"""Distillation block by block: for experts that do not fit into memory twice.

The blocks are trained in their order, each to give what the expert's own block gives, from what the compressed blocks
before it give: a later block makes good what the earlier ones have left, as in GPTQ (arXiv 2210.17323) and OmniQuant
(2308.13137). Final norm and head come last, by the divergence of the logits. Hidden states of the text are kept on the
host; of the weights, one block of the expert or of the student is on the device at a time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached

from meswitch.artifact import Artifact, Manifest, delta_from_parts
from meswitch.artifact.manifest import Distillation, stored_name
from meswitch.artifact.writer import NOWHERE, SavedWork
from meswitch.checkpoint import Checkpoint
from meswitch.codec import Change, CodedDelta, LowRankDelta, PackedDelta, restore_coded
from meswitch.compression.distill.student import Student, attach
from meswitch.compression.distill.training import (
    Sample,
    batches,
    check_text,
    divergence,
    fit,
    in_batches,
    mean,
    record,
    split,
    training_dtype,
    training_plan,
    weights,
)
from meswitch.compression.options import TrainingRecipe
from meswitch.compression.partial_model import PartialModel
from meswitch.compression.text import CalibrationSet
from meswitch.units import Progress, silent

_LOGITS = 1 << 26  # that are made at once, at most
Changed = dict[str, PackedDelta | LowRankDelta | CodedDelta | Tensor]
States = dict[int, Tensor]  # number of a sample -> [tokens, hidden_size], on the host


def train_blocks(
    base: Checkpoint,
    expert: Checkpoint,
    artifact: Artifact,
    text: CalibrationSet,
    recipe: TrainingRecipe,
    *,
    device: torch.device,
    progress: Progress = silent,
    work: SavedWork = NOWHERE,
) -> tuple[Changed, Distillation]:
    """Train an artifact's codes and scales on text, and what else the recipe says, one block after the other.

    Args:
        work: where each trained block is saved, and the state of the one at work now and then. An interrupted training
            goes on there, once the hidden states of the text have been computed again.

    The embedding stays as it is, and so does a head that is tied to it. The recipe's steps are taken for every block
    and once more for the head.

    Returns:
        the tensors that changed, by name, and what was done: the divergence of the whole model, before and after. It
        never rises: if training does not help, nothing is changed.

    Raises:
        ConfigError: fewer than 10 sequences, or a method that has nothing to train. IncompatibleError: the model has
            other layers than the artifact, or is not a row of blocks.
    """
    check_text(text.sequences)
    generator = torch.Generator().manual_seed(recipe.seed)
    held, rest = split(text, recipe, generator)
    job = _Job(base, expert, artifact, recipe, held, rest, generator, device)
    theirs, ours = job.enter()
    untrained = {sample.number: ours[sample.number] for sample in held}
    changed: Changed = {}
    parts = len(job.frame) + 1

    def told(part: int, what: str) -> Callable[[int, float, float], None]:
        def tell(step: int, now: float, before: float) -> None:
            done = part * recipe.steps + step
            # equal until it has been measured again
            value = f"{before:.4g} before" if now == before else f"{now:.4g}, {before:.4g} before"
            progress("training", done, parts * recipe.steps, f"{what} {value}")

        return tell

    plan = training_plan(artifact, text, recipe, device)
    for index in range(len(job.frame)):
        job.advance(index, job.frame.block(index), theirs)
        what = f"block {index + 1} of {len(job.frame)}: held-out error of its output"
        block = job.frame.block(index)
        student = job.attach(block, _inside(f"{job.frame.name(index)}."))
        job.advance(index, block, untrained, held)
        saved = work.load(f"block-{index:04d}", plan)
        if saved is None:
            _fit_block(job, index, block, student, ours, theirs, told(index, what), work, f"{plan} {index}")
            trained = student.trained(artifact)
            work.save(f"block-{index:04d}", plan, None, _by_stored_name(trained))
        else:
            trained = _from_stored(artifact, saved[1])
            drawn = batches(rest, recipe.batch, generator)
            for _ in range(recipe.steps):  # what its training drew
                next(drawn)
            progress("training", (index + 1) * recipe.steps, parts * recipe.steps, f"block {index + 1} is trained")
        del block, student
        # as it will be stored: later blocks make good its rounding, and a resumed training sees the same
        job.advance(index, job.stored_block(index, trained), ours)
        changed |= trained

    end = _End(job, theirs)
    before = job.mean(lambda batch: end.divergence(batch, untrained))
    _, after = fit(
        end.student.groups(),
        batches(rest, recipe.batch, job.generator),
        lambda batch: end.divergence(batch, ours, learn=True),
        lambda: job.mean(lambda batch: end.divergence(batch, ours)),
        recipe,
        told(len(job.frame), "head: held-out divergence"),
        work,
        f"{plan} head",
    )
    changed |= end.student.trained(artifact)
    return changed if after < before else {}, record(artifact, recipe, before, min(before, after))


def _fit_block(
    job: "_Job",
    index: int,
    block: nn.Module,
    student: Student,
    ours: States,
    theirs: States,
    told: Callable[[int, float, float], None],
    work: SavedWork,
    plan: str,
) -> None:
    """Train a block to give `theirs` from `ours`."""
    fit(
        student.groups(),
        batches(job.rest, job.recipe.batch, job.generator),
        lambda batch: job.error(index, block, batch, ours, theirs).backward(),
        lambda: job.mean(lambda batch: float(job.error(index, block, batch, ours, theirs))),
        job.recipe,
        told,
        work,
        plan,
    )


def _inside(prefix: str) -> Callable[[str], str | None]:
    """A tensor's name without what a block's tensors begin with; None for other tensors."""
    return lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None


@dataclass(frozen=True)
class _Trained:
    """An artifact with what was trained since in the place of what it stores."""

    artifact: Artifact
    trained: Changed

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def directory(self) -> Path:
        return self.artifact.directory

    def read(self, name: str) -> Change | Tensor | None:
        return self.trained[name] if name in self.trained else self.artifact.read(name)


def _by_stored_name(trained: Changed) -> dict[str, Tensor]:
    return {
        stored_name(name, suffix): part
        for name, value in trained.items()
        for suffix, part in ({"": value} if isinstance(value, Tensor) else value.tensors()).items()
    }


def _from_stored(artifact: Artifact, stored: Mapping[str, Tensor]) -> Changed:
    """What `_by_stored_name` made flat."""
    found: Changed = {}
    for name, entry in artifact.manifest.tensors.items():
        parts = {suffix: stored[key] for suffix in entry.stored if (key := stored_name(name, suffix)) in stored}
        if not parts:
            continue
        if entry.kind in ("packed", "lowrank"):
            delta = delta_from_parts(entry, parts)
            assert isinstance(delta, PackedDelta | LowRankDelta)
            found[name] = delta
        elif entry.kind == "coded":
            found[name] = restore_coded(entry.method, entry.meta, parts, entry.base_rows, entry.matrix[1])
        else:
            found[name] = parts[""]
    return found


@dataclass
class _Job:
    """What the training of all blocks shares."""

    base: Checkpoint
    expert: Checkpoint
    artifact: Artifact
    recipe: TrainingRecipe
    held: list[Sample]
    rest: list[Sample]
    generator: torch.Generator
    device: torch.device

    def __post_init__(self) -> None:
        self.dtype = training_dtype(self.expert, self.device)
        self.frame = self.new_frame()
        architecture = self.frame.weights.architecture
        self.embedding, self.head = f"{architecture.embedding}.weight", f"{architecture.head}.weight"
        self.tied = self.head not in self.frame.weights.plan.by_target

    def new_frame(self) -> PartialModel:
        return PartialModel(self.expert, self.device, self.dtype)

    def attach(self, model: nn.Module, names: Callable[[str], str | None]) -> Student:
        return attach(model, self.base, self.expert, self.artifact, self.recipe, self.device, self.dtype, names)

    @torch.no_grad()
    def stored_block(self, index: int, trained: Changed) -> nn.Module:
        """A block as the artifact will restore it, with what was trained of it."""
        block, inside = self.frame.block(index), _inside(f"{self.frame.name(index)}.")
        fixed = dataclasses.replace(self.recipe, codes=False, norms=False)
        stored = _Trained(self.artifact, trained)
        attach(block, self.base, self.expert, stored, fixed, self.device, self.dtype, inside)
        for name, value in trained.items():
            for parameter in self.frame.weights.plan.parameters_of(name):
                path = inside(parameter)
                if isinstance(value, Tensor) and path is not None:
                    block.get_parameter(path).copy_(value)
        return block

    @torch.no_grad()
    def enter(self) -> tuple[States, States]:
        """What the first block sees in the expert, and in the student."""
        frame = self.new_frame()
        theirs = self._embedded(frame)
        self.attach(frame.model, lambda name: name if name == self.embedding else None)
        return theirs, self._embedded(frame)

    def _embedded(self, frame: PartialModel) -> States:
        states: States = {}
        for batch in in_batches(self.held + self.rest):
            _store(batch, frame.enter(self._padded(batch)), states)
        return states

    def _padded(self, batch: list[Sample]) -> Tensor:
        length = max(len(sample.ids) for sample in batch)
        return torch.tensor([sample.ids + [0] * (length - len(sample.ids)) for sample in batch], device=self.device)

    @torch.no_grad()
    def advance(self, index: int, block: nn.Module, states: States, samples: list[Sample] | None = None) -> None:
        """Replace what a block sees by what it gives, for all samples or for these."""
        for batch in in_batches(self.held + self.rest if samples is None else samples):
            _store(batch, self._call(index, block, batch, states), states)

    def _call(self, index: int, block: nn.Module, batch: list[Sample], states: States) -> Tensor:
        length = max(len(sample.ids) for sample in batch)
        rows = [F.pad(states[sample.number], (0, 0, 0, length - len(sample.ids))) for sample in batch]
        hidden = torch.stack(rows).to(self.device)
        call = self.frame.calls(self._padded(batch), embedded=False)[index]
        with cached():  # a restored parameter may be asked for many times: by every expert of a mixture
            given = call.after(self.frame.passed_on(hidden)).run(block)
        return given[0] if isinstance(given, tuple) else given

    def error(self, index: int, block: nn.Module, batch: list[Sample], ours: States, theirs: States) -> Tensor:
        """Squared error of the block's output at a token, relative to that output: its mean, as the recipe weighs.

        Relative token by token: the first token's hidden states can be a thousand times those of all others.
        """
        given = self._call(index, block, batch, ours)
        found = torch.cat([row[: len(sample.ids)] for sample, row in zip(batch, given, strict=True)]).float()
        wanted = self.tokens(batch, theirs).float()
        missed, power = (found - wanted).square().sum(-1), wanted.square().sum(-1)
        return (missed / power * weights(batch, self.recipe.question_weight, self.device)).sum()

    def tokens(self, batch: list[Sample], states: States) -> Tensor:
        """[tokens, hidden_size], on the device."""
        return torch.cat([states[sample.number] for sample in batch]).to(self.device)

    def mean(self, value: Callable[[list[Sample]], float]) -> float:
        return mean(self.held, self.recipe.question_weight, value)


class _End:
    """What follows the last block: final norm and head, the expert's and the student's.

    A tied head is not trained: it would change what the first block sees.
    """

    def __init__(self, job: _Job, theirs: States) -> None:
        self.job, self.theirs = job, theirs
        self.teacher, self.frame = job.new_frame(), job.new_frame()
        made = job.attach(self.frame.model, self._place)
        self.student = Student(made.model, {}, made.norms) if job.tied else made

    def _place(self, name: str) -> str | None:
        return None if name == self.job.embedding or name.startswith(f"{self.frame.prefix}.") else name

    def divergence(self, batch: list[Sample], states: States, *, learn: bool = False) -> float:
        """KL(expert || student) in nats at a token, its mean as the recipe weighs.

        Args:
            states: what the student's last block gave.
            learn: leave gradients in the student's parameters.
        """
        wanted, found = self.job.tokens(batch, self.theirs), self.job.tokens(batch, states)
        weight = weights(batch, self.job.recipe.question_weight, self.job.device)
        total = 0.0
        size = max(1, _LOGITS // self.job.expert.config.get_text_config().vocab_size)
        for some in torch.arange(len(wanted), device=self.job.device).split(size):
            with torch.no_grad():
                theirs = self.teacher.leave(wanted[some])
            loss = (divergence(theirs, self.frame.leave(found[some])) * weight[some]).sum()
            if learn:
                loss.backward()
            total += float(loss.detach())
        return total


def _store(batch: list[Sample], hidden: Tensor, states: States) -> None:
    """Keep the hidden states of a padded batch on the host, padding left out."""
    for sample, row in zip(batch, hidden, strict=True):
        states[sample.number] = row[: len(sample.ids)].to("cpu", copy=True)

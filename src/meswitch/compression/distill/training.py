"""Training a compressed expert so that it says what the full one says: end to end, and what both ways share.

BitDelta (arXiv 2402.10193, section 3.1) and ME-Switch (2406.09041) train scales end to end on logits, with fixed codes.
Ours, unless a method's published recipe says otherwise (`options.TrainingRecipe`): codes are trained with their scales,
salient weights and norms (`student`); the loss is the KL divergence from the full expert and the relative error of
every block's output; what the user says counts less than what the assistant answers. Ours with every recipe: the
state of least divergence on held-out text is kept. It needs both models in memory, unlike the rest of compression.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meswitch.artifact import Artifact
from meswitch.artifact.manifest import Distillation
from meswitch.artifact.writer import NOWHERE, SavedWork, digest
from meswitch.checkpoint import Checkpoint
from meswitch.codec import CodedDelta, LowRankDelta, PackedDelta
from meswitch.compression.distill.student import Group, Outputs, Student, build_student, frozen, read_batch
from meswitch.compression.options import Scope, TrainingRecipe
from meswitch.compression.partial_model import working_dtype
from meswitch.compression.text import CalibrationSet
from meswitch.errors import ConfigError
from meswitch.units import Progress, format_bytes, plural, silent

_HELD_OUT = 128  # sequences at most
_READ_TOKENS = 8192  # that are read together, padding included
_POOL = 8  # batches that are sorted by length together
_FLOAT32_PARAMETERS = 1 << 30
_WARM_UP = 10  # steps
END_TO_END_PARAMETERS = 2_000_000_000  # above, a step end to end takes seconds, and blocks need fewer of them
STEP_TOKENS = 2048  # of a step that are in memory at once, at least
_MOST_STEP_TOKENS = 8192  # more are no faster
_STEP_SHARE = 0.25  # of a GPU's free memory for a step's tokens: others may train beside
# For every parameter: expert, base, matrices as they are restored, their nearest levels, latent weights, gradients and
# AdamW's two moments of these in 4 bytes each, the gradients of the matrices twice (as they come, and where the CUDA
# graph takes them), levels, and what is in use for one matrix at a time.
_BYTES_A_PARAMETER = 48
_LOGITS = 8  # tensors as large as the logits of a step's part
_STATES = 24  # numbers that a block keeps for the gradient, a token and a hidden unit
_FREE = 0.8
_WORK = 8  # operations for a parameter and token: forward of both models, backward of one
_EFFICIENCY = 0.35  # of what a large product reaches
_LAUNCHES = {"cuda": 1e-3, "cpu": 2e-4}  # seconds a step for every matrix that is restored
_REMEMBERED = 1 << 28  # bytes of logits


def check_text(sequences: list[list[int]]) -> None:
    """Refuse text too short to train on and to hold a part out.

    Raises:
        ConfigError: fewer than 10 sequences.
    """
    if len(sequences) < 10:
        raise ConfigError(f"distill: {len(sequences)} calibration sequences are too few; give at least 10")


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


def split(
    text: CalibrationSet, recipe: TrainingRecipe, generator: torch.Generator
) -> tuple[list[Sample], list[Sample]]:
    """A held-out tenth, and the rest, which is trained on."""
    samples = [
        Sample(ids, start, number)
        for number, (ids, start) in enumerate(zip(text.sequences, text.known_starts, strict=True))
    ]
    order = torch.randperm(len(samples), generator=generator).tolist()
    count = min(max(1, len(order) // 10), _HELD_OUT)
    return [samples[i] for i in order[:count]], [samples[i].cut(recipe.length) for i in order[count:]]


def batches(samples: list[Sample], size: int, generator: torch.Generator) -> Iterator[list[Sample]]:
    """Batches without end, every sample once before any comes again; of similar lengths, so that little is padding."""
    pool: list[Sample] = []
    while True:
        while len(pool) < size * _POOL:
            pool += [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
        chosen, pool = sorted(pool[: size * _POOL], key=lambda sample: len(sample.ids)), pool[size * _POOL :]
        for at in torch.randperm(_POOL, generator=generator).tolist():
            yield chosen[at * size : (at + 1) * size]


def in_batches(samples: list[Sample]) -> Iterator[list[Sample]]:
    """Every sample once, in batches of similar lengths."""
    batch: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids)):
        if batch and (len(batch) + 1) * len(sample.ids) > _READ_TOKENS:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def weights(batch: list[Sample], question: float, device: torch.device) -> Tensor:
    """What each token of a batch counts: [tokens], of sum 1."""
    weight = torch.tensor([w for sample in batch for w in sample.weights(question)], device=device)
    return weight / weight.sum()


@torch.no_grad()
def mean(samples: list[Sample], question: float, value: Callable[[list[Sample]], float]) -> float:
    """Of a weighted mean over a batch's tokens, that over all samples'."""
    total = mass = 0.0
    for batch in in_batches(samples):
        count = sum(sum(sample.weights(question)) for sample in batch)
        total, mass = total + value(batch) * count, mass + count
    return total / mass


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(found)) in nats.

    Args:
        wanted: [..., vocabulary] float32 logits.
        found: likewise; the gradient is theirs alone.

    Returns:
        [...] float32.
    """
    result: Tensor = _Divergence.apply(wanted, found)
    return result


class _Divergence(torch.autograd.Function):
    """The gradient is the difference of the probabilities; autograd would take it apart into passes over all logits."""

    @staticmethod
    def forward(ctx: Any, wanted: Tensor, found: Tensor) -> Tensor:
        theirs, ours = wanted.log_softmax(-1), found.log_softmax(-1)
        probability = theirs.exp()
        ctx.save_for_backward(probability, ours)
        return torch.linalg.vecdot(probability, theirs.sub_(ours))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        probability, ours = ctx.saved_tensors
        return None, ours.exp().sub_(probability).mul_(gradients[0][..., None])


def fit(
    groups: list[Group],
    text: Iterator[Any],
    learn: Callable[[Any], object],
    held_out: Callable[[], float],
    recipe: TrainingRecipe,
    told: Callable[[int, float, float], None],
    work: SavedWork,
    plan: str,
) -> tuple[float, float]:
    """Train parameters and leave them in the state that was best on held-out text.

    Args:
        text: batches without end.
        learn: leaves a batch's gradients in the parameters.
        held_out: what is to fall.
        told: after every step: steps done, the held-out value at the last look and before the first step.
        work: where the state is saved now and then.
        plan: a digest of all that decides it.

    Returns:
        the held-out value before the first step, and the best.
    """
    trained = [parameter for parameters, _ in groups for parameter in parameters]
    settings: list[dict[str, Any]] = [
        {"params": parameters, "lr": recipe.learning_rate * factor} for parameters, factor in groups if parameters
    ]
    saved = work.load("training", plan) if trained else None
    if saved is None:
        before = now = best = held_out()
        kept, done = [p.detach().clone() for p in trained], 0
    if not trained:
        return before, best
    optimizer = torch.optim.AdamW(settings, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=0.0, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    if saved is not None:
        (done, before, now, best), tensors = saved
        kept = _restore(trained, optimizer, tensors)
        for _ in range(done):  # the batches that it has seen
            next(text)
    for step in range(done + 1, recipe.steps + 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _rate(step - 1, recipe.steps)
        optimizer.zero_grad(set_to_none=True)
        learn(next(text))
        optimizer.step()
        if step % recipe.check_every == 0 or step == recipe.steps:
            now = held_out()
            if now < best:
                best, kept = now, [p.detach().clone() for p in trained]
        told(step, now, before)
        if work.due:
            work.save("training", plan, (step, before, now, best), _state(trained, kept, optimizer))
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return before, best


def _state(trained: list[nn.Parameter], kept: list[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What `_restore` needs: parameters now and at their best, and the optimizer's moments."""
    state: dict[str, Tensor] = {f"{i}.now": parameter for i, parameter in enumerate(trained)}
    state |= {f"{i}.best": value for i, value in enumerate(kept)}
    for i, parameter in enumerate(trained):
        state |= {f"{i}.optimizer.{key}": value for key, value in optimizer.state[parameter].items()}
    return state


@torch.no_grad()
def _restore(trained: list[nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> list[Tensor]:
    """Put a saved state into parameters and optimizer; returns the parameters at their best."""
    for i, parameter in enumerate(trained):
        parameter.copy_(state[f"{i}.now"])
        mark = f"{i}.optimizer."
        optimizer.state[parameter] = {
            key.removeprefix(mark): value.to(parameter.device) for key, value in state.items() if key.startswith(mark)
        }
    return [state[f"{i}.best"].to(parameter.device) for i, parameter in enumerate(trained)]


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def training_plan(artifact: Artifact, text: CalibrationSet, recipe: TrainingRecipe, device: torch.device) -> str:
    """A digest of all that decides what a training ends with."""
    start, way = artifact.manifest.to_json(), dataclasses.asdict(recipe)
    return digest(start, dataclasses.asdict(text.info), way, device.type)


def training_dtype(expert: Checkpoint, device: torch.device) -> torch.dtype:
    """bfloat16 rounds away what a step changes; only where float32 would not fit is it worth that."""
    return torch.float32 if expert.parameters <= _FLOAT32_PARAMETERS else working_dtype(device, expert.parameters)


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Products of float32 on a GPU with 10 bits of mantissa (TF32), which training does not feel."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def record(artifact: Artifact, recipe: TrainingRecipe, before: float, after: float) -> Distillation:
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


@dataclass(frozen=True, slots=True)
class Cost:
    """What a training takes.

    Args:
        seconds: about, on this device as it is now.
        nbytes: of the device's memory, at most.
    """

    seconds: float
    nbytes: int


def end_to_end_bytes(expert: Checkpoint, step_tokens: int = STEP_TOKENS) -> int:
    """About how much memory a training end to end takes on the device."""
    return int(expert.parameters * _BYTES_A_PARAMETER + step_tokens * _bytes_a_token(expert))


def step_tokens_for(expert: Checkpoint, device: torch.device) -> int:
    """How many tokens of a step are in memory at once: a GPU with room takes a step in fewer, larger parts."""
    if device.type != "cuda":
        return STEP_TOKENS
    room = _STEP_SHARE * torch.cuda.mem_get_info(device)[0]
    return min(_MOST_STEP_TOKENS, max(STEP_TOKENS, int(room / _bytes_a_token(expert))))


def _bytes_a_token(expert: Checkpoint) -> int:
    """Of the device's memory, what a token of a step takes."""
    config = expert.config.get_text_config()
    return 4 * (config.vocab_size * _LOGITS + config.num_hidden_layers * config.hidden_size * _STATES)


def scope_for(expert: Checkpoint, device: torch.device) -> tuple[Scope, str | None]:
    """End to end where the whole model fits in the device's free memory as often as that takes, else block by block.

    Returns:
        the scope, and where only the free memory speaks against end to end, what a person is told: the same call may
        make another artifact when others use less of the GPU.
    """
    if device.type != "cuda":
        return "model", None
    if expert.parameters > END_TO_END_PARAMETERS:
        return "block", None
    needed, free = end_to_end_bytes(expert), torch.cuda.mem_get_info(device)[0]
    if needed <= _FREE * free:
        return "model", None
    return "block", (
        f"block by block because the GPU has only {format_bytes(free)} of memory free: end to end takes "
        f"{format_bytes(needed)}, which {_FREE:.0%} of the free memory must hold, and may keep more; free some, "
        "or give --distill-scope, so that the same is done whatever is free"
    )


def cost_of(expert: Checkpoint, lengths: Sequence[int], recipe: TrainingRecipe, device: torch.device) -> Cost:
    """What a training takes.

    Args:
        lengths: of the calibration text's sequences, in tokens.
    """
    mean = sum(min(length, recipe.length or length) for length in lengths) / len(lengths)
    tokens = recipe.steps * recipe.batch * mean * 1.1  # a tenth is padding and looks at held-out text
    work = tokens * expert.parameters * _WORK
    matrices = sum(len(info.shape) > 1 for info in expert.tensors.values())
    seconds = work / (_EFFICIENCY * _operations_a_second(training_dtype(expert, device), device))
    if recipe.scope == "model":
        seconds += recipe.steps * matrices * _LAUNCHES.get(device.type, 1e-3)
        return Cost(seconds, end_to_end_bytes(expert, step_tokens_for(expert, device)))
    config = expert.config.get_text_config()
    # every block's states go through it three times more, and its weights are read twice
    passes = 3 * sum(lengths) * expert.parameters * 2 / (_EFFICIENCY * _operations_a_second(torch.bfloat16, device))
    largest = expert.parameters // max(1, config.num_hidden_layers)
    head = 2 * config.vocab_size * config.hidden_size * 4
    return Cost(seconds + passes + expert.nbytes / 1e9, max(largest * _BYTES_A_PARAMETER, head * 5))


def statement(recipe: TrainingRecipe, cost: Cost) -> str:
    """What a person is told before a training starts."""
    way = "end to end" if recipe.scope == "model" else "block by block"
    return (
        f"training {way} for {plural(recipe.steps, 'step')}: takes {about_duration(cost.seconds)} more than "
        f"compressing alone, and {format_bytes(cost.nbytes)} of memory; --distill 0 leaves it out"
    )


def about_duration(seconds: float) -> str:
    """`about 40 seconds`, `about 12 minutes`, `about 5 hours`."""
    for unit, name in ((3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * unit:
            return f"about {seconds / unit:.0f} {name}s"
    return f"about {plural(round(seconds), 'second')}"


def _operations_a_second(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second that a large product reaches."""
    side = 4096 if device.type == "cuda" else 512
    one = torch.ones(side, side, device=device, dtype=dtype)
    with fast_products():
        best = float("inf")
        for _ in range(3):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            one @ one
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def train_end_to_end(
    base: Checkpoint,
    expert: Checkpoint,
    artifact: Artifact,
    text: CalibrationSet,
    recipe: TrainingRecipe,
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
        # equal until it has been measured again
        what = f"{before:.3g} nats a token before" if now == before else f"{now:.3g} nats a token, {before:.3g} before"
        progress("training", step, recipe.steps, f"held-out divergence {what}")

    def held_out() -> float:
        with student.held(learns=False):
            return mean(held, question, lambda batch: _divergence(full, student.model, batch, question, device))

    tokens = step_tokens_for(expert, device)
    full = _TeacherAnswers(teacher, sum(len(sample.ids) for sample in held), device)
    before, best = fit(
        student.groups(),
        batches(rest, recipe.batch, generator),
        lambda batch: _learn(teacher, student, batch, recipe, device, tokens),
        held_out,
        recipe,
        told,
        work,
        training_plan(artifact, text, recipe, device),
    )
    return student.trained(artifact), record(artifact, recipe, before, best)


def _learn(
    teacher: Any, student: Student, batch: list[Sample], recipe: TrainingRecipe, device: torch.device, tokens: int
) -> None:
    """Leave a batch's gradients in the student's parameters: so many tokens at a time, which bounds the memory."""
    longest = max(len(sample.ids) for sample in batch)
    few = max(1, tokens // longest)
    parts = [batch[start : start + few] for start in range(0, len(batch), few)]
    mass = [sum(sum(sample.weights(recipe.question_weight)) for sample in part) for part in parts]
    with student.held(learns=True):
        for part, own in zip(parts, mass, strict=True):
            loss = _loss(teacher, student.model, part, recipe, device)
            (loss * (own / sum(mass))).backward()


def _loss(teacher: Any, student: Any, batch: list[Sample], recipe: TrainingRecipe, device: torch.device) -> Tensor:
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

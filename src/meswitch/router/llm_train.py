"""Training the LLM router: fine-tuning on the option letter only, then calibration on rows that it did not see."""

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from meswitch.cpu import fitting_threads
from meswitch.durable import fsync_path, recover_directory, replacing_directory
from meswitch.router.base import OTHER, RouterError
from meswitch.router.calibrate import COVERAGE, auroc, calibration_error, temperature, threshold
from meswitch.router.choice import NONE_OF_THESE, ChoiceModel, ChoicePrompt
from meswitch.router.data import Row, disguises, hold_out
from meswitch.router.llm import (
    Llm,
    LlmRouter,
    LlmSettings,
    ModelInfo,
    add_adapters,
    check_descriptions,
    merge_adapters,
    take_adapters,
)
from meswitch.router.store import RouterProvenance, ScoreCalibration

# Which questions a batch of the LLM router's training asks: its rows, the options they show, the words of both.


_EXAMPLE = 120  # characters of a request that stands for a description
_STATE = "state.json"
_TENSORS = "state.safetensors"
_FORMAT = "meswitch-router-training"
Report = Callable[[int, int, float], None]  # (steps done, in all, loss)


class TrainingRows:
    """The rows to train on, each with its copies without habits; and by expert, for examples."""

    def __init__(self, rows: Sequence[Row], prompt: ChoicePrompt) -> None:
        self._prompt = prompt
        self.domains = [row.domain for row in rows]
        self.texts = [row.query for row in rows]
        self.disguised = [[row.query for row in copies] for copies in disguises(rows)]
        self.of = {name: [i for i, row in enumerate(rows) if row.domain == name] for name in {*self.domains}}

    def query(self, i: int, disguise: float, generator: torch.Generator) -> list[int]:
        """The tokens of row `i`, or of one of its copies."""
        copies = self.disguised[i]
        disguised = copies and _chance(disguise, generator)
        return self._prompt.query(copies[_draw(len(copies), generator)] if disguised else self.texts[i])


def balanced(rows: Sequence[Row], balance: float) -> Tensor:
    """[n] float64, how likely each row is drawn: between "as they come" (0) and all domains, and all sources of a
    domain, alike (1)."""
    domains = Counter(row.domain for row in rows)
    sources = Counter((row.domain, row.source) for row in rows)
    within: defaultdict[str, float] = defaultdict(float)
    for (domain, _), count in sources.items():
        within[domain] += count ** (1 - balance)
    return torch.tensor(
        [
            domains[row.domain] ** (1 - balance) * sources[row.domain, row.source] ** -balance / within[row.domain]
            for row in rows
        ],
        dtype=torch.float64,
    )


def described(
    name: str, descriptions: Mapping[str, str], rows: TrainingRows, reword: float, generator: torch.Generator
) -> str:
    """What a question says of a label: its description or, for the share `reword`, a part of it or a request."""
    if name == OTHER:
        return NONE_OF_THESE
    text = descriptions[name]
    if not _chance(reword, generator):
        return text
    if rows.of.get(name) and _chance(0.5, generator):
        example = " ".join(rows.texts[rows.of[name][_draw(len(rows.of[name]), generator)]].split())
        return f'Requests such as "{example[:_EXAMPLE]}"'
    parts = [part for part in re.split(r"[:;,.]\s+", text.strip().rstrip(".")) if part]
    some = [part for part in parts if _chance(0.5, generator)]
    return ", ".join(some or [parts[_draw(len(parts), generator)]]) if parts else text


def _chance(share: float, generator: torch.Generator) -> bool:
    return float(torch.rand(1, generator=generator)) < share


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def draw_options(experts: list[str], settings: LlmSettings, step: int, generator: torch.Generator) -> list[str]:
    """Which labels a question shows, in which order."""
    settled = step / max(1.0, settings.settle * settings.steps)
    if not _chance(settled, generator) and len(experts) < settings.max_options:
        return [*experts, OTHER]
    shuffled = [experts[i] for i in torch.randperm(len(experts), generator=generator).tolist()]
    shown = shuffled[: settings.max_options - 1]
    if len(shown) > 1 and _chance(settings.drop, generator):
        shown = shown[: 1 + _draw(len(shown) - 1, generator)]
    labels = [*shown, OTHER]
    return [labels[i] for i in torch.randperm(len(labels), generator=generator).tolist()]


# Checkpoints of a training run: weights and optimizer as safetensors, the rest as JSON; replaced in one step.
#
# Steps draw their rows and their dropout from (seed, step), so a step number is all the random state there is, and
# a resumed run goes on with the very bits of one that was never interrupted.


def save_checkpoint(
    path: Path,
    step: int,
    run: str,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    mean: Mapping[str, Tensor],
) -> None:
    """Replace the checkpoint at `path`. run: identifies data and settings. weights: name -> trained parameter.

    Args:
        mean: of the last steps' weights, or empty.
    """
    with replacing_directory(path) as partial:
        tensors = {f"weight.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
        tensors |= {f"mean.{name}": value.detach().cpu().contiguous() for name, value in mean.items()}
        for name, value in weights.items():
            for key, item in optimizer.state.get(value, {}).items():
                tensors[f"optimizer.{key}.{name}"] = item.detach().cpu().contiguous()
        save_file(tensors, partial / _TENSORS)
        (partial / _STATE).write_text(json.dumps({"format": _FORMAT, "step": step, "run": run}) + "\n")
        for part in (partial / _TENSORS, partial / _STATE):
            fsync_path(part)


def load_checkpoint(
    path: Path,
    run: str,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    mean: dict[str, Tensor],
) -> int:
    """Put a checkpoint's state into `weights`, `optimizer` and `mean`; the steps that are done, 0 without a checkpoint.

    Raises:
        RouterError: a checkpoint of another run, or a damaged one.
    """
    recover_directory(path)
    if not path.exists():
        return 0
    state = _state(path)
    if state["run"] != run:
        raise RouterError(
            f"{path}: run: a checkpoint of other data, settings or another model; remove the directory to start anew"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise RouterError(f"{path / _TENSORS}: cannot be read ({error}); remove the directory to start anew") from None
    averaged = any(name.startswith("mean.") for name in tensors)
    for name, value in weights.items():
        with torch.no_grad():
            value.copy_(_taken(tensors, f"weight.{name}", value, path))
        if averaged:
            mean[name] = _taken(tensors, f"mean.{name}", value, path).to(value.device)
        keys = ("step", "exp_avg", "exp_avg_sq")
        found = {key: tensors.pop(f"optimizer.{key}.{name}", None) for key in keys}
        if any(item is not None for item in found.values()):
            if any(item is None for item in found.values()):
                raise RouterError(f"{path / _TENSORS}: optimizer.{name}: incomplete; remove the directory")
            optimizer.state[value] = {
                key: item if key == "step" else item.to(value.device) for key, item in found.items() if item is not None
            }
    if tensors:
        raise RouterError(f"{path / _TENSORS}: {min(tensors)}: unknown tensor; remove the directory to start anew")
    return int(state["step"])


def _taken(tensors: dict[str, Tensor], name: str, like: Tensor, path: Path) -> Tensor:
    """A tensor out of a checkpoint's, of another's shape."""
    saved = tensors.pop(name, None)
    if saved is None or saved.shape != like.shape:
        raise RouterError(f"{path / _TENSORS}: {name}: missing or of another shape; remove the directory")
    return saved


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RouterError(f"{path / _STATE}: cannot be read ({error}); remove the directory to start anew") from None
    fits = isinstance(state, dict) and state.get("format") == _FORMAT
    if not fits or type(state.get("step")) is not int or not isinstance(state.get("run"), str):
        raise RouterError(f"{path / _STATE}: not a checkpoint of router training; choose another place")
    return dict(state)


# The mean of a training run's weights over its last steps: flatter than any one of them, and better on what is new.
#
# Averaging along the way is stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407, section 3).


class Average:
    """mean: name -> the mean so far, of float32 weights; empty before the first step that counts."""

    def __init__(self, weights: Mapping[str, Tensor], steps: int, share: float) -> None:
        """share: of the steps, the last ones; 0 averages nothing."""
        self._weights = weights
        self._first = steps - round(share * steps)
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, done: int) -> None:
        """Take the weights after `done` steps in, if these are some of the last."""
        count = done - self._first
        if count < 1:
            return
        for name, value in self._weights.items():
            if count == 1:
                self.mean[name] = value.detach().clone()
            else:
                self.mean[name].lerp_(value, 1 / count)

    @torch.no_grad()
    def put(self) -> None:
        """Make the mean the weights, in place."""
        for name, value in self.mean.items():
            self._weights[name].copy_(value)


def train_llm_router(
    rows: Sequence[Row],
    descriptions: Mapping[str, str],
    llm: Llm,
    *,
    settings: LlmSettings | None = None,
    data_sha256: str = "",
    fallback: str = "base",
    checkpoint: Path | None = None,
    save_every: int = 50,
    report: Report | None = None,
) -> LlmRouter:
    """Fine-tune `llm.model` (in place) to choose among the experts' descriptions; the same inputs give the same router.

    Every question shows the options in a new order. Some leave experts out: their queries then belong to "none of
    these", so the model must read the options that are there. Rows of `other` always do. Some options are in other
    words, and some queries written in another way, so that it is the meaning of both that is learnt.

    Args:
        rows: labelled queries; a tenth of them (`settings.holdout`) calibrates.
        descriptions: of all experts, in the family's order.
        llm: with float32 weights.
        settings: how to train, and how to ask then; None: the defaults.
        data_sha256: of the file of rows, for the record.
        fallback: who answers when the router abstains.
        checkpoint: a directory for the state after every `save_every` steps; a run goes on from what is there.
        report: is told (steps done, in all, loss).

    Raises:
        RouterError: rows of a domain that is no expert, too few rows to hold some out, or a foreign checkpoint.
        ConfigError: an empty description, or LoRA without PEFT.
    """
    settings = settings or LlmSettings()
    check_descriptions(descriptions)
    _check_rows(rows, descriptions)
    seen, held_out = hold_out(rows, settings.holdout, settings.seed)
    provenance = RouterProvenance.of((row.domain for row in rows), data_sha256)
    unmeasured = ScoreCalibration(1.0, 0.0, 0.0, 0.0)
    router = LlmRouter(llm, descriptions, settings, unmeasured, provenance, fallback=fallback)
    if settings.weights != "reference":
        run = _identity(rows, descriptions, llm.info, settings)
        router.tuned = _tune(router.chooser, seen, descriptions, settings, run, checkpoint, save_every, report)
    return calibrate(router, held_out)


def calibrate(router: LlmRouter, rows: Sequence[Row]) -> LlmRouter:
    """Set the router's temperature and threshold by labelled rows that it was not trained on."""
    odds = router.log_odds([row.query for row in rows])
    targets = torch.tensor([router.labels.index(row.domain) for row in rows])
    divisor = temperature(odds, targets)
    experts = len(router.experts)
    confidence, best = (odds.double() / divisor).softmax(1)[:, :experts].max(1)
    known = targets < experts
    correct = (best == targets)[known]
    router.calibration = ScoreCalibration(
        temperature=divisor,
        threshold=threshold(confidence[known], confidence[~known], COVERAGE),
        accuracy=float(correct.double().mean()) if len(correct) else 0.0,
        ece=calibration_error(confidence[known], correct),
        auroc=auroc(confidence[known], confidence[~known]),
    )
    router.threshold = router.calibration.threshold
    return router


def _tune(
    chooser: ChoiceModel,
    rows: Sequence[Row],
    descriptions: Mapping[str, str],
    settings: LlmSettings,
    run: str,
    checkpoint: Path | None,
    save_every: int,
    report: Report | None,
) -> dict[str, Tensor]:
    """What training changed: adapters, or all weights in the model's own dtype."""
    model = chooser.model
    stored = getattr(model.config, "dtype", None) or torch.float32
    if settings.weights == "lora":
        weights = add_adapters(model, settings.rank, settings.alpha, settings.top)
    else:
        weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        list(weights.values()), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    average = Average(weights, settings.steps, settings.average)
    done = load_checkpoint(checkpoint, run, weights, optimizer, average.mean) if checkpoint is not None else 0
    asked = TrainingRows(rows, chooser.prompt)
    mass = balanced(rows, settings.balance)
    chooser.forget()
    with fitting_threads(model.device, chooser.hidden_size):
        for step in range(done, settings.steps):
            torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout, if the model has any
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate(step, settings.steps, settings.warmup)
            loss = _step(chooser, asked, mass, descriptions, settings, step)
            nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.add(step + 1)
            if checkpoint is not None and (step + 1) % save_every == 0 and step + 1 < settings.steps:
                save_checkpoint(checkpoint, step + 1, run, weights, optimizer, average.mean)
            if report is not None:
                report(step + 1, settings.steps, loss)
    average.put()
    model.eval()
    if settings.weights == "lora":
        tensors = take_adapters(model)
        merge_adapters(model, tensors, settings.rank, settings.alpha)
        return tensors
    with torch.no_grad():
        for value in weights.values():
            value.copy_(value.to(stored))  # what is measured from here on is what is stored
    return {name: value.detach().cpu().to(stored) for name, value in weights.items()}


def _step(
    chooser: ChoiceModel,
    rows: TrainingRows,
    mass: Tensor,
    descriptions: Mapping[str, str],
    settings: LlmSettings,
    step: int,
) -> float:
    """Gradients of one batch: a few questions, each with its own options and order; the mean loss."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    replacement = settings.batch > len(rows.texts)
    drawn = torch.multinomial(mass, settings.batch, replacement=replacement, generator=generator)
    asked: list[tuple[list[list[int]], list[str]]] = []
    targets: list[Tensor] = []
    for part in drawn.split(settings.question):
        chosen = part.tolist()
        order = draw_options(list(descriptions), settings, step, generator)
        options = [described(name, descriptions, rows, settings.reword, generator) for name in order]
        asked.append(([rows.query(i, settings.disguise, generator) for i in chosen], options))
        domains = [rows.domains[i] for i in chosen]
        targets.append(torch.tensor([order.index(d if d in order else OTHER) for d in domains]))
    device = chooser.model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = chooser.forward(asked)
    losses = [cross_entropy(x, y.to(device), reduction="sum") for x, y in zip(logits, targets, strict=True)]
    loss = torch.stack(losses).sum() / settings.batch
    loss.backward()
    return float(loss.detach())


def rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate's share of its peak: a linear rise, then half a cosine down to a tenth."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, steps - rise))


def _check_rows(rows: Sequence[Row], descriptions: Mapping[str, str]) -> None:
    counts = Counter(row.domain for row in rows)
    for domain in counts.keys() - {*descriptions, OTHER}:
        raise RouterError(f"domain: {domain!r} is no expert of the family ({', '.join(descriptions)})")
    if len(rows) < 20:
        raise RouterError(f"data: {len(rows)} rows; at least 20 are needed to train on some and calibrate on others")
    if len(counts) < 2:
        raise RouterError(f"domain: nothing to tell apart; give rows of two domains, or of {OTHER!r}")


def _identity(rows: Sequence[Row], descriptions: Mapping[str, str], info: ModelInfo, settings: LlmSettings) -> str:
    """A hash of everything that decides what a training run does."""
    told = [
        [[row.query, row.domain, row.source] for row in rows],
        list(descriptions.items()),
        info.fingerprint,
        dataclasses.asdict(settings),
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

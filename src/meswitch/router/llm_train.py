"""Training the LLM router: fine-tuning on the option letter only, then calibration on rows that it did not see."""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from meswitch.router.average import Average
from meswitch.router.base import OTHER, RouterError
from meswitch.router.data import Row
from meswitch.router.heads import auroc, calibration_error, temperature, threshold
from meswitch.router.letters import LetterModel
from meswitch.router.llm import LlmRouter, LlmSettings, ModelInfo, check_descriptions
from meswitch.router.llm_checkpoint import load_checkpoint, save_checkpoint
from meswitch.router.lora import add_adapters, merge_adapters, take_adapters
from meswitch.router.questions import Asked, balanced, described, draw_options
from meswitch.router.split import hold_out
from meswitch.router.store import Calibration, Provenance
from meswitch.threads import fitting_threads
from meswitch.version import __version__

COVERAGE = 0.99  # of known queries to answer, where the data has no `other` rows to set the threshold by

Report = Callable[[int, int, float], None]  # (steps done, in all, loss)


def train_llm_router(
    rows: Sequence[Row],
    descriptions: Mapping[str, str],
    model: Any,
    tokenizer: Any,
    info: ModelInfo,
    *,
    settings: LlmSettings | None = None,
    data_sha256: str = "",
    fallback: str = "base",
    checkpoint: Path | None = None,
    save_every: int = 50,
    report: Report | None = None,
) -> LlmRouter:
    """Fine-tune `model` (in place) to choose among the experts' descriptions; the same inputs give the same router.

    Every question shows the options in a new order. Some leave experts out: their queries then belong to "none of
    these", so the model must read the options that are there. Rows of `other` always do. Some options are in other
    words, and some queries written in another way, so that it is the meaning of both that is learnt.

    Args:
        model: a causal LM with float32 weights. descriptions: of all experts, in the family's order.
        checkpoint: a directory for the state after every `save_every` steps; a run goes on from what is there.

    Raises:
        RouterError: rows of a domain that is no expert, too few rows to hold some out, or a foreign checkpoint.
        ConfigError: an empty description, or LoRA without PEFT.
    """
    settings = settings or LlmSettings()
    check_descriptions(descriptions)
    _check_rows(rows, descriptions)
    seen, held_out = hold_out(rows, settings.holdout, settings.seed)
    router = LlmRouter(
        model, tokenizer, info, descriptions, settings, Calibration(1.0, 0.0, 0.0, 0.0), _provenance(rows, data_sha256),
        fallback=fallback,
    )  # fmt: skip
    if settings.weights != "reference":
        run = _identity(rows, descriptions, info, settings)
        router.tuned = _tune(router.letters, seen, descriptions, settings, run, checkpoint, save_every, report)
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
    router.calibration = Calibration(
        temperature=divisor,
        threshold=threshold(confidence[known], confidence[~known], COVERAGE),
        accuracy=float(correct.double().mean()) if len(correct) else 0.0,
        ece=calibration_error(confidence[known], correct),
        auroc=auroc(confidence[known], confidence[~known]),
    )
    router.threshold = router.calibration.threshold
    return router


def _tune(
    letters: LetterModel,
    rows: Sequence[Row],
    descriptions: Mapping[str, str],
    settings: LlmSettings,
    run: str,
    checkpoint: Path | None,
    save_every: int,
    report: Report | None,
) -> dict[str, Tensor]:
    """What training changed: adapters, or all weights in the model's own dtype."""
    model = letters.model
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
    asked = Asked(rows, letters.prompt)
    mass = balanced(rows, settings.balance)
    letters.forget()
    with fitting_threads(model.device, letters.hidden_size):
        for step in range(done, settings.steps):
            torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout, if the model has any
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate(step, settings.steps, settings.warmup)
            loss = _step(letters, asked, mass, descriptions, settings, step)
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
    letters: LetterModel,
    rows: Asked,
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
    device = letters.model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = letters.forward(asked)
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


def _provenance(rows: Sequence[Row], data_sha256: str) -> Provenance:
    import transformers

    return Provenance(
        data_sha256=data_sha256,
        rows=dict(sorted(Counter(row.domain for row in rows).items())),
        meswitch=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )

"""One job of `run.py`: compress an expert by one setting and measure what is left of it.

The functions run in worker processes; each keeps base, full experts and held-out texts once it has loaded them.
"""

import ctypes
import dataclasses
import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import meswitch
from benchmarks.quality.settings import Keywords
from meswitch.compression.options import recipe_for
from meswitch.evaluate import (
    Score,
    Text,
    divergences,
    gain_retained,
    layer_errors,
    total,
)
from meswitch_lab import options
from meswitch_lab.toy import CHECKABLE, DOMAINS, accuracy, own_answers

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "family"


@dataclass(frozen=True)
class Plan:
    """What all jobs of a run share."""

    family: str  # directory with `base` and the experts
    experts: tuple[str, ...]
    questions: int
    seed: int
    fidelity_questions: int
    device: str

    @property
    def batch_size(self) -> int:
        return 128 if self.device == "cpu" else 2048  # the CPU's caches, the GPU's launches


def start() -> None:
    """Prepare a process for jobs."""
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def keep_freed_memory() -> None:
    """Keep freed memory, not give it back to the system and fault it in again: twice as fast a CPU's batch of answers.

    glibc only; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        for option in (trim_threshold, mmap_threshold):
            mallopt(option, 2**31 - 1)


def measure_reference(plan: Plan, expert: str) -> tuple[str, dict[str, Any]]:
    """The expert's name; base and full expert on the expert's questions, and how far the base is from the expert."""
    started = time.perf_counter()
    full, base = _model(plan, expert), _model(plan, "base")
    scores = {"expert": _score(plan, *full, expert), "base": _score(plan, *base, expert)}
    reference: dict[str, Any] = {kind: score and _outcomes(score) for kind, score in scores.items()}
    reference["base_fidelity"] = reference["base_layers"] = None
    texts = _texts(plan, expert)
    if _vocabulary(full[0]) == _vocabulary(base[0]):
        reference["base_fidelity"] = _fidelity(base[0], full[0], texts)
        reference["base_layers"] = _layers(full[0], base[0], texts)
    return expert, reference | {"seconds": round(time.perf_counter() - started, 2)}


def measure(plan: Plan, expert: str, keywords: Keywords, reference: dict[str, Any], layers: bool) -> dict[str, Any]:
    """A finished row; or, where anything goes wrong, one that says what."""
    row: dict[str, Any] = {"expert": expert, "keywords": keywords}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return row | _measured(plan, expert, keywords, reference, layers, Path(scratch) / expert)
        except Exception as error:  # noqa: BLE001 - one row's failure is recorded, and must not stop the others
            reason = f"{type(error).__name__}: {error}".replace(scratch, "").replace(f"{ROOT}/", "")
            return row | {"failed": reason}


def _measured(
    plan: Plan, expert: str, keywords: Keywords, reference: dict[str, Any], layers: bool, out: Path
) -> dict[str, Any]:
    family = Path(plan.family)
    clock = _Clock()
    asked = options(**resolved(plan, expert, keywords))
    artifact = meswitch.compress(family / "base", family / expert, out, asked, device=plan.device)
    clock.lap("compress")
    full, texts = _model(plan, expert)[0], _texts(plan, expert)  # once a process, so on no job's clock
    clock.skip()
    model = meswitch.load_merged(family / "base", out).to(plan.device)
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    clock.lap("load")
    row: dict[str, Any] = {"bits_per_weight": artifact.bits_per_weight}
    score = _score(plan, model, tokenizer, expert)
    clock.lap("accuracy")
    if score is not None:
        theirs = [_stored(reference[kind], expert, plan.seed) for kind in ("expert", "base")]
        gain = gain_retained(score, *theirs)
        row |= _outcomes(score) | {"gain": gain.value, "interval": gain.interval}
    row |= _fidelity(model, full, texts)
    if layers:
        row["layers"] = _layers(full, model, texts)
    clock.lap("fidelity")
    return row | {"seconds": clock.laps}


def resolved(plan: Plan, expert: str, keywords: Keywords) -> Keywords:
    """The keywords as `meswitch_lab.options` wants them: calibration files by their paths, a `TrainingRecipe`."""
    known = [name for name in DOMAINS if (EXAMPLE / "calibration" / f"{name}.jsonl").exists()]
    other = known[(known.index(expert) + 1) % len(known)]
    names = {"{own}": _calibration(plan, expert), "{other}": _calibration(plan, other)}
    found = {"calibration": "{own}"} | keywords
    if isinstance(found["calibration"], str):
        for name, file in names.items():
            found["calibration"] = found["calibration"].replace(name, str(file))
    if isinstance(found.get("distill"), dict):
        found["distill"] = dataclasses.replace(recipe_for(found.get("method", "me-switch")), **found["distill"])
    return found


def _calibration(plan: Plan, expert: str) -> Path:
    """The family's own file, or the example family's: larger families of the same make have the same domains."""
    own = Path(plan.family) / "calibration" / f"{expert}.jsonl"
    return own if own.exists() else EXAMPLE / "calibration" / f"{expert}.jsonl"


@functools.lru_cache(maxsize=5)
def _model(plan: Plan, name: str) -> tuple[Any, Any]:
    directory = Path(plan.family) / name
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(plan.device).eval()
    return model, AutoTokenizer.from_pretrained(directory)


@functools.lru_cache(maxsize=8)
def _texts(plan: Plan, expert: str) -> list[Text]:
    n, seed = plan.fidelity_questions, plan.seed
    return own_answers(*_model(plan, expert), expert, n, seed, batch_size=plan.batch_size)


def _score(plan: Plan, model: Any, tokenizer: Any, domain: str) -> Score | None:
    if domain not in CHECKABLE:
        return None
    return accuracy(model, tokenizer, domain, plan.questions, plan.seed, batch_size=plan.batch_size)


def _outcomes(score: Score) -> dict[str, Any]:
    """As `evaluate.ResultRow.to_dict` stores them: 1 is right, in the order of `draw`."""
    return {"correct": score.correct, "outcomes": "".join("01"[right] for right in score.outcomes)}


def _stored(found: dict[str, Any], domain: str, seed: int) -> Score:
    return Score(domain, seed, tuple(one == "1" for one in found["outcomes"]))


def _fidelity(model: Any, full: Any, texts: list[Text]) -> dict[str, Any]:
    each = list(divergences(model, full, texts))
    whole = total(each)
    figures = dataclasses.asdict(whole)
    return figures | {"kl_by_text": [float(f"{one.kl:.3g}") for one in each]}


def _layers(full: Any, model: Any, texts: list[Text]) -> dict[str, float]:
    return {name: float(f"{error:.5g}") for name, error in layer_errors(full, model, texts).items()}


def _vocabulary(model: Any) -> int:
    return model.get_output_embeddings().weight.shape[0]


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def skip(self) -> None:
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self._last = now

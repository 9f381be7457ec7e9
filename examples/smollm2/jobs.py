"""The jobs of a run: train an expert, measure it beside its base, compress it and measure what is left.

They run in worker processes. Each stores its result in the work directory, and is not done again once it is there:

    experts/NAME/                 the checkpoint, and training.json
    calibration/NAME.jsonl        the training data as messages
    references/NAME.json          base and full expert
    artifacts/NAME/METHOD-BUDGET  an artifact, and beside it .json: the options and the seconds
    rows/NAME/METHOD-BUDGET.json  a row of the results
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.queues import Queue as MultiprocessingQueue
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import meswitch
import methods
import score
from meswitch.durable import write_text
from meswitch.evaluate import answer
from meswitch.loaded import attend_at_any_length
from tasks import TASKS, Row, read_rows, spread, write_calibration
from train import Recipe, train

Found = dict[str, Any]
TRAINED = ("scope", "held_out_before", "held_out_after")  # how the compressed expert was, see `Distillation`
COLUMNS = (  # of the results
    *("expert", "training", "method", "budget", "bpw"),
    *(*score.RIGHT, "kl", "kl_merged", *TRAINED, "seconds", "notices"),
)
_device = "cpu"  # of this process


@dataclass(frozen=True, slots=True)
class Plan:
    """What all jobs of a run share.

    base_name: what `base` was made from. questions: of a dev set; None is all. kl_questions: whose answers KL is taken
    on. batch: questions that are answered together.
    """

    work: Path
    data: Path
    base: Path
    base_name: str
    max_steps: int | None
    step_tokens: int
    questions: int | None
    kl_questions: int
    batch: int

    def dev(self, expert: str) -> list[Row]:
        return spread(read_rows(self.data / f"{expert}.dev.jsonl"), self.questions)

    def kl_rows(self, expert: str) -> list[Row]:
        return spread(self.dev(expert), self.kl_questions)

    def expert(self, name: str) -> Path:
        return self.work / "experts" / name

    def artifact(self, name: str, method: str, budget: methods.Budget) -> Path:
        return self.work / "artifacts" / name / label(method, budget)

    def row(self, name: str, method: str, budget: methods.Budget) -> Path:
        return self.work / "rows" / name / f"{label(method, budget)}.json"

    @property
    def asked(self) -> Found:
        """What decides a measurement, beside the models."""
        return {"questions": self.questions, "kl_questions": self.kl_questions}


def label(method: str, budget: methods.Budget) -> str:
    """`rtn-2.2`; the method alone where it has no choice."""
    return method if budget is None else f"{method}-{budget:g}"


def start(devices: "Queue[str] | MultiprocessingQueue[str]", threads: int) -> None:
    """Prepare a process: it takes the next device, which is then its only one."""
    global _device
    place = torch.device(devices.get())
    if place.type == "cuda":
        torch.cuda.set_device(place)
    _device = place.type
    torch.set_num_threads(threads)
    attend_at_any_length()  # training and answers are of transformers alone
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def stored(file: Path, like: Found) -> Found | None:
    """A stored result, if it is there and was asked for with the same values."""
    if not file.is_file():
        return None
    found: Found = json.loads(file.read_text())
    return found if all(found.get(name) == value for name, value in like.items()) else None


def store(file: Path, found: Found) -> Found:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(found, indent=1) + "\n")
    return found


def say(line: str) -> None:
    print(line, flush=True)


def recipe_of(plan: Plan, expert: str) -> Recipe:
    task = TASKS[expert]
    return Recipe(task.epochs, task.learning_rate, plan.max_steps, plan.step_tokens)


def trained(plan: Plan, expert: str) -> Found | None:
    """What is stored of an expert's training.

    Raises:
        SystemExit: it was another training.
    """
    file = plan.expert(expert) / "training.json"
    if not file.is_file():
        return None
    found = stored(file, {"base": plan.base_name, **asdict(recipe_of(plan, expert))})
    if found is None:
        raise SystemExit(f"{file.parent}: has another base or recipe; delete it, or choose another --work")
    return found


def train_expert(plan: Plan, expert: str) -> Found:
    """Train an expert and write its calibration text; what it took."""
    if found := trained(plan, expert):
        return found
    rows = read_rows(plan.data / f"{expert}.train.jsonl")
    write_calibration(rows, plan.work / "calibration" / f"{expert}.jsonl")
    for kind in ("experts", "artifacts", "rows"):  # what is left of another training
        shutil.rmtree(plan.work / kind / expert, ignore_errors=True)
    (plan.work / "references" / f"{expert}.json").unlink(missing_ok=True)
    plan.expert(expert).parent.mkdir(parents=True, exist_ok=True)
    found = train(plan.base, rows, plan.expert(expert), recipe_of(plan, expert), _device, say)
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    return store(plan.expert(expert) / "training.json", {"base": plan.base_name, **found, "ended": ended})


def measure_reference(plan: Plan, expert: str) -> Found:
    """Base and full expert on the expert's dev set."""
    file = plan.work / "references" / f"{expert}.json"
    if found := stored(file, plan.asked):
        return found
    started = time.perf_counter()
    tokenizer, rows = AutoTokenizer.from_pretrained(plan.base), plan.dev(expert)
    found = dict(plan.asked)
    for name, directory in (("base", plan.base), ("full", plan.expert(expert))):
        model = score.load(directory, torch.bfloat16, _device)
        found[name] = score.pack(score.outcomes(model, tokenizer, TASKS[expert], rows, plan.batch))
    base, full = (score.load(path, torch.float32, _device) for path in (plan.base, plan.expert(expert)))
    found["base_kl"] = score.kl(base, full, score.answers_of(tokenizer, plan.kl_rows(expert)))
    return store(file, found | {"seconds": time.perf_counter() - started})


def compress(plan: Plan, expert: str, method: str, budget: methods.Budget) -> tuple[meswitch.Artifact, Found]:
    """The artifact, made if it is not there, and of its making `seconds` and `notices`."""
    out = plan.artifact(expert, method, budget)
    file = out.with_name(out.name + ".json")
    chosen = {"options": methods.METHODS[method][budget]}
    if out.is_dir() and (found := stored(file, chosen)):
        return meswitch.Artifact.open(out), found
    notices: list[str] = []

    def notice(line: str) -> None:
        notices.append(line)
        say(f"{expert} {out.name}: {line}")

    started = time.perf_counter()
    options = methods.options(method, budget, str(plan.work / "calibration" / f"{expert}.jsonl"))
    out.parent.mkdir(parents=True, exist_ok=True)
    artifact = meswitch.compress(
        plan.base, plan.expert(expert), out, options, device=_device, overwrite=True, notice=notice
    )
    return artifact, store(file, chosen | {"seconds": time.perf_counter() - started, "notices": notices})


def stored_row(plan: Plan, expert: str, method: str, budget: methods.Budget) -> Found | None:
    """A row, if it is there and was asked for with the same questions and options."""
    return stored(plan.row(expert, method, budget), {**plan.asked, "options": methods.METHODS[method][budget]})


def measure(plan: Plan, expert: str, method: str, budget: methods.Budget, reference: Found) -> Found:
    """One row: an expert, compressed and merged."""
    if found := stored_row(plan, expert, method, budget):
        return found
    artifact, made = compress(plan, expert, method, budget)
    tokenizer, rows = AutoTokenizer.from_pretrained(plan.base), plan.dev(expert)
    texts = score.answers_of(tokenizer, plan.kl_rows(expert))
    full = score.load(plan.expert(expert), torch.float32, _device)
    exact = meswitch.load_merged(plan.base, artifact.directory, torch.float32).to(_device)
    divergence = score.kl(exact, full, texts)
    del exact
    merged = meswitch.load_merged(plan.base, artifact.directory, torch.bfloat16).to(_device)
    right = score.pack(score.outcomes(merged, tokenizer, TASKS[expert], rows, plan.batch))
    training, distillation = trained(plan, expert), artifact.manifest.method.distillation
    found = {
        "expert": expert,
        "training": training and training.get("ended"),
        "method": method,
        "budget": budget,
        "bpw": artifact.bits_per_weight,
        **score.compared(expert, right, reference["full"], reference["base"]),
        "kl": divergence,
        "kl_merged": score.kl(merged.float(), full, texts),  # float32 arithmetic: what rounding the weights does
        **{name: getattr(distillation, name, None) for name in TRAINED},
        "seconds": made["seconds"],
        "notices": made.get("notices"),
        **plan.asked,
        "options": methods.METHODS[method][budget],
        "right": right,
    }
    return store(plan.row(expert, method, budget), found)


def compare_served(plan: Plan, expert: str, method: str, budget: methods.Budget, count: int) -> Found:
    """Answers of the embedded engine beside the merged model's, both in float32."""
    artifact, _ = compress(plan, expert, method, budget)
    tokenizer, rows = AutoTokenizer.from_pretrained(plan.base), spread(plan.dev(expert), count)
    longest = TASKS[expert].max_new_tokens or 64
    turns = [[{"role": "user", "content": row.question}] for row in rows]
    with meswitch.Engine(
        plan.base, {expert: artifact.directory}, device=_device, dtype="float32", slots=1, backend="reference"
    ) as engine:
        served = [done.text for done in engine.generate(turns, model=expert, max_new_tokens=longest)]
    merged = meswitch.load_merged(plan.base, artifact.directory, torch.float32).to(_device)
    texts = answer(merged, tokenizer, [row.question for row in rows], longest, plan.batch)
    equal = sum(one.strip() == other.strip() for one, other in zip(served, texts, strict=True))
    return {"expert": expert, "method": method, "budget": budget, "questions": len(rows), "equal": equal}


def release() -> None:
    """Give a finished job's device memory back, for the other processes on the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_worker(job: str, *arguments: Any) -> Found:
    """Run a job of this module by name; what goes wrong is a result too, so that the others go on."""
    try:
        return globals()[job](*arguments)
    except Exception as error:  # noqa: BLE001 - one job's failure is told, and must not stop the others
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return {"failed": reason.replace(f"{os.getcwd()}/", "")}
    finally:
        release()

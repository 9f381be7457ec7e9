"""Train four fine-tunes of SmolLM2-135M-Instruct, compress them by every method, and measure what is left.

    python examples/smollm2/run.py --data DIR --work DIR --out benchmarks/results/smollm2.json
    python examples/smollm2/run.py --data DIR --work DIR --experts sql math --methods me-switch rtn --budgets 2.2 1.3

The data are not part of this repository: README.md says where they are from and what a row is. Every result is stored
in the work directory at once: what is there already is not done again, so an interrupted run goes on where it was, and
a run can be done in parts.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import queue
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import base
import jobs
import methods
from jobs import Found, Plan
from meswitch.durable import write_text
from tasks import TASKS

PACKAGES = ("torch", "transformers", "meswitch")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of NAME.train.jsonl and NAME.dev.jsonl")
    parser.add_argument("--work", type=Path, required=True, help="where experts, artifacts and results are kept")
    parser.add_argument("--out", type=Path, help="the results; default: smollm2.json in the work directory")
    parser.add_argument("--base", default=base.HUB_ID, help="hub id, checkpoint directory or GGUF file")
    parser.add_argument("--experts", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=methods.METHODS, default=list(methods.METHODS))
    parser.add_argument("--budgets", nargs="+", type=float, choices=methods.BUDGETS, default=list(methods.BUDGETS))
    parser.add_argument("--train-only", action="store_true", help="make the experts and stop")
    parser.add_argument("--served", type=int, metavar="N", help="compare N served answers with the merged model's too")
    parser.add_argument("--questions", type=int, metavar="N", help="of each dev set; default: all")
    parser.add_argument("--kl-questions", type=int, default=200, metavar="N", help="whose answers KL is taken on")
    parser.add_argument("--batch", type=int, metavar="N", help="questions answered at a time; default: 1280, CPU: 32")
    parser.add_argument("--max-steps", type=int, metavar="N", help="of training, to try the command")
    parser.add_argument("--step-tokens", type=int, default=24576, metavar="N", help="padded tokens of a training step")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: every GPU, or the CPU if there is none")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="processes a GPU; 0: this process")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Found:
    options = parse(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for expert in options.experts:
        for part in ("train", "dev"):
            if not (file := options.data / f"{expert}.{part}.jsonl").is_file():
                sys.exit(f"{file}: no such file; README.md says what it is")
    options.work.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        work=options.work.resolve(),
        data=options.data.resolve(),
        base=base.prepare(options.base, options.work / "base").resolve(),
        base_name=options.base if options.base == base.HUB_ID else Path(options.base).name,
        max_steps=options.max_steps,
        step_tokens=options.step_tokens,
        questions=options.questions,
        kl_questions=options.kl_questions,
        batch=options.batch or (1280 if device == "cuda" else 32),
    )
    for expert in options.experts:
        jobs.trained(plan, expert)  # or complain before any work
    results = Results(plan, options.out or options.work / "smollm2.json", device)
    with workers(device, options.workers) as pool:
        Run(plan, pool, results, [] if options.train_only else methods.chosen(options.methods, options.budgets)).go(
            options.experts, options.served
        )
    return results.save()


def workers(device: str, count: int) -> Executor:
    """`count` processes a device; with 0, jobs are done one by one in this one.

    Threads of a process: OMP_NUM_THREADS, or its share of the cores. Where several runs share a machine, say how many:
    threads that wait for each other's cores take many times as long.
    """
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device == "cuda" else ["cpu"]
    if not count:
        here: queue.Queue[str] = queue.Queue()
        here.put(devices[0])
        return ThreadPoolExecutor(1, initializer=jobs.start, initargs=(here, torch.get_num_threads()))
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for place in devices * count:
        places.put(place)
    share = max(1, len(os.sched_getaffinity(0)) // (len(devices) * count))
    threads = int(os.environ.get("OMP_NUM_THREADS", share))
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}  # processes inherit it
    return ProcessPoolExecutor(
        len(devices) * count, mp_context=context, initializer=jobs.start, initargs=(places, threads)
    )


class Results:
    """The file of results: what is stored in the work directory, and rows that were there before."""

    def __init__(self, plan: Plan, file: Path, device: str) -> None:
        """Raises: SystemExit: the file has results of another base or other questions."""
        self.plan, self.file, self.device = plan, file, device
        self.before: Found = json.loads(file.read_text()) if file.is_file() else {"meta": {}, "rows": []}
        meta = self.before["meta"]
        for name, value in self._shared.items():
            if meta.get(name, value) != value:
                sys.exit(f"{file}: has results of {name} {meta[name]}, not {value}; choose another --out, or delete it")
        self.served: list[Found] = meta.get("served", [])

    @property
    def _shared(self) -> Found:
        return {"base": self.plan.base_name, "max_steps": self.plan.max_steps, **self.plan.asked}

    def save(self) -> Found:
        """Write everything that there is now, and give it."""
        rows, experts = {}, dict(self.before["meta"].get("experts", {}))
        for row in self.before["rows"] + self._stored_rows():
            rows[row["expert"], row["method"], row["budget"]] = row
        for expert in TASKS:
            reference = jobs.stored(self.plan.work / "references" / f"{expert}.json", self.plan.asked)
            training = jobs.stored(self.plan.expert(expert) / "training.json", {"base": self.plan.base_name})
            if reference and training:
                experts[expert] = {"base_kl": reference["base_kl"], "training": training}
        meta = {
            "card": torch.cuda.get_device_name() if self.device == "cuda" else platform.machine() + " CPU",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            **self._shared,
            "experts": {name: experts[name] for name in TASKS if name in experts},
            "served": self.served,
        }
        found = {"meta": meta, "rows": sorted(rows.values(), key=self._place)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(found, indent=1) + "\n")
        return found

    def _stored_rows(self) -> list[Found]:
        """Rows of the work directory that answer what is asked now."""
        found = []
        for expert in TASKS:
            for method, budget in methods.chosen(list(methods.METHODS), list(methods.BUDGETS)):
                if row := jobs.stored_row(self.plan, expert, method, budget):
                    found.append({name: value for name, value in row.items() if name in jobs.COLUMNS})
        return found

    def _place(self, row: Found) -> tuple[int, int, float]:
        known = list(methods.METHODS)
        place = known.index(row["method"]) if row["method"] in known else len(known)
        return list(TASKS).index(row["expert"]), place, -(row["budget"] or 0)


class Run:
    """Jobs that wait for others: an expert is trained, then measured, then compressed by each method."""

    def __init__(self, plan: Plan, pool: Executor, results: Results, chosen: list[tuple[str, methods.Budget]]) -> None:
        self.plan, self.pool, self.results, self.chosen = plan, pool, results, chosen
        self.started = time.perf_counter()
        self.waiting: dict[Future[Found], tuple[str, tuple[Any, ...]]] = {}
        self.failed: list[str] = []

    def go(self, experts: list[str], served: int | None) -> None:
        """Do everything; with `served`, for the first expert and method too.

        Raises:
            SystemExit: a job failed; the others are done.
        """
        for expert in experts:
            self._submit("train_expert", expert)
        self._drain()
        if served and self.chosen and not self.failed:
            self._submit("compare_served", experts[0], *self.chosen[0], served)
            self._drain()
        if self.failed:
            self.results.save()
            sys.exit("\n".join(["failed:", *self.failed]))

    def _submit(self, job: str, *arguments: Any) -> None:
        self.waiting[self.pool.submit(jobs.in_worker, job, self.plan, *arguments)] = job, arguments

    def _drain(self) -> None:
        while self.waiting:
            for future in wait(self.waiting, return_when=FIRST_COMPLETED).done:
                job, arguments = self.waiting.pop(future)
                found = future.result()
                names = " ".join(f"{one}" for one in arguments if isinstance(one, str | float))
                line = f"{job} {names}: {told(job, found)}"
                print(f"{time.perf_counter() - self.started:.0f} s: {line}", flush=True)
                if "failed" in found:
                    self.failed.append(line)
                else:
                    self._finished(job, arguments[0], found)

    def _finished(self, job: str, expert: str, found: Found) -> None:
        if job == "train_expert" and self.chosen:
            self._submit("measure_reference", expert)
        elif job == "measure_reference":
            for method, budget in self.chosen:
                self._submit("measure", expert, method, budget, found)
        elif job == "compare_served":
            self.results.served = [found]
        self.results.save()


def told(job: str, found: Found) -> str:
    """What a job found, in a few words."""
    if "failed" in found:
        return found["failed"]
    if job == "train_expert":
        return f"{found['steps']} steps, loss {found['loss']:.3f}, moved {found['relative_norm']:.4f}"
    if job == "measure_reference":
        right = [found[name].count("1") for name in ("base", "full") if found[name]]
        return f"right: base, full {right}, KL of the base {found['base_kl']:.4f}"
    if job == "compare_served":
        return f"{found['equal']} of {found['questions']} answers equal"
    gain = "" if found["gain"] is None else f"gain {found['gain']:.3f}, lost {found['lost']}, won {found['won']}, "
    divergences = f"KL {found['kl']:.5f}, merged {found['kl_merged']:.5f}"
    way = {"model": ", trained end to end", "block": ", trained block by block"}.get(found["scope"], "")
    return f"{found['bpw']:.3f} bpw, {gain}{divergences}, compressed in {found['seconds']:.0f} s{way}"


if __name__ == "__main__":
    main()

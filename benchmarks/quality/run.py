"""Quality per byte: every setting of a suite on every expert of a family, one command for each table.

    python benchmarks/quality/run.py frontier ablations family [--experts math code] [--jobs 2] [--device cuda]
    python benchmarks/quality/doc.py                    # docs/results/quality.md and its plots, from what is stored

The suites are in `settings.py`. A job compresses one expert by one setting, counts the whole artifact's bytes,
asks the merged model, in float32, the same questions as the full expert and the base, and compares it with the full
expert on held-out text. Results are in `benchmarks/results/quality-SUITE.json` (`store.py` says how), written
after every job: what is there already is not measured again, so an interrupted run goes on where it was.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import meswitch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.common.generated import RESULTS
from benchmarks.quality import experiment
from benchmarks.quality.settings import BARS, SUITES, key_of
from benchmarks.quality.store import Store
from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch_lab.toy import DOMAINS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", choices=SUITES, metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--family", type=Path, default=experiment.EXAMPLE, help="directory with base and experts")
    parser.add_argument("--experts", nargs="+", choices=DOMAINS, help="all that the family has, if left out")
    parser.add_argument("--questions", type=int, default=2000, help="an expert")
    parser.add_argument("--seed", type=int, default=2, help="which questions")
    parser.add_argument("--fidelity-questions", type=int, default=128, help="prompts for KL, top-1 and layers")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes, of one thread each")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="settings whose `group: label` contains one of these")
    parser.add_argument("--again", action="store_true", help="measure the chosen settings anew")
    parser.add_argument("--out", type=Path, help="the results' file, of a single suite")
    options = parser.parse_args(arguments)
    if options.out and len(options.suites) > 1:
        parser.error("--out: is one file; give one suite")
    experts = options.experts or [name for name in DOMAINS if (options.family / name).is_dir()]
    plan = experiment.Plan(
        str(options.family.resolve()),
        tuple(experts),
        options.questions,
        options.seed,
        options.fidelity_questions,
        options.device,
    )
    with workers(options.jobs) as pool:
        for suite in options.suites:
            path = options.out or RESULTS / f"quality-{suite}.json"
            run_suite(pool, plan, suite, Store.load(path), options)


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes of one thread each; None if this one does the work."""
    if jobs == 1:
        experiment.start()
        yield None
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # they inherit it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=experiment.start) as pool:
        yield pool


def results(pool: ProcessPoolExecutor | None, task: Callable[..., Any], calls: list[tuple[Any, ...]]) -> Iterator[Any]:
    """What the calls return, as they finish."""
    if pool is None:
        yield from (task(*call) for call in calls)
    else:
        yield from (done.result() for done in as_completed([pool.submit(task, *call) for call in calls]))


def run_suite(
    pool: ProcessPoolExecutor | None, plan: experiment.Plan, suite: str, store: Store, options: argparse.Namespace
) -> None:
    """Measure what is missing of a suite."""
    meta = shared_by_all_jobs(plan)
    stored = store.meta.get("checksums", {})
    differ = [name for name in meta if name != "checksums" and store.meta.get(name, meta[name]) != meta[name]]
    differ += [name for name, digest in meta["checksums"].items() if stored.get(name, digest) != digest]
    if differ:
        sys.exit(f"{store.path}: holds results of another {', '.join(differ)}; choose another --out, or delete it")
    meta["checksums"] = stored | meta["checksums"]  # runs can have different experts
    store.meta, store.settings = meta, SUITES[suite]
    store.bars = BARS if suite == "family" else {}
    chosen = [
        setting
        for setting in store.settings
        if options.only is None or any(text in f"{setting.group}: {setting.label}" for text in options.only)
    ]
    # Settings that are the same in two tables are one job; the layers of one of them are enough.
    jobs = {
        (setting.key, expert): setting
        for setting in sorted(chosen, key=lambda one: one.layers)
        for expert in plan.experts
        if options.again or not store.done(setting, expert)
    }
    missing = [expert for expert in plan.experts if expert not in store.references]
    print(f"{suite}: {len(jobs)} jobs to do, {len(chosen) * len(plan.experts)} rows chosen", flush=True)
    if not jobs and not missing:
        store.save()
        return
    store.runs.append(this_run(suite, options))
    started = time.perf_counter()
    for expert, reference in results(pool, experiment.measure_reference, [(plan, expert) for expert in missing]):
        store.references[expert] = reference
    store.references = {name: store.references[name] for name in DOMAINS if name in store.references}
    store.save()
    order = {setting.key: place for place, setting in reversed(list(enumerate(store.settings)))}
    calls = [
        (plan, expert, setting.keywords, store.references[expert], setting.layers)
        for (_, expert), setting in sorted(jobs.items(), key=lambda item: order[item[0][0]])
    ]
    for count, found in enumerate(results(pool, experiment.measure, calls), start=1):
        job = found | {"run": len(store.runs) - 1}
        store.jobs[key_of(job["keywords"]), job["expert"]] = job
        store.save()
        print(f"{count}/{len(jobs)} {time.perf_counter() - started:.0f} s: {line(job, plan)}", flush=True)


def shared_by_all_jobs(plan: experiment.Plan) -> dict[str, Any]:
    """What results in one file must agree in."""
    family = Path(plan.family)
    sums = {name: fingerprint(Checkpoint.open(family / name)) for name in ("base", *plan.experts)}
    return {
        "questions": plan.questions,
        "seed": plan.seed,
        "fidelity_questions": plan.fidelity_questions,
        "checksums": sums,
    }


def this_run(suite: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything to repeat it, and nothing about where this checkout is."""
    family = options.family.resolve()
    inside = family.is_relative_to(experiment.ROOT)
    command = [
        "python benchmarks/quality/run.py",
        suite,
        "--questions",
        str(options.questions),
        "--seed",
        str(options.seed),
    ]
    command += ["--fidelity-questions", str(options.fidelity_questions), "--device", options.device]
    command += ["--jobs", str(options.jobs), "--family"]
    command.append(str(family.relative_to(experiment.ROOT)) if inside else family.name)
    if options.experts:
        command += ["--experts", *options.experts]
    if options.only:
        command += ["--only", *(f"'{text}'" for text in options.only)]
    cuda = options.device.startswith("cuda")
    return {
        "command": " ".join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "meswitch": meswitch.__version__,
    }


def commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None where git cannot say."""
    git = ["git", "--no-optional-locks", "-C", str(experiment.ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "src"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + (" and changes" if changed else "")


def line(job: dict[str, Any], plan: experiment.Plan) -> str:
    """A finished job for the terminal."""
    name = f"{job['expert']} {key_of(job['keywords'])}"
    if "failed" in job:
        return f"{name}: failed: {job['failed']}"
    right = f"{job['correct']}/{plan.questions} right, gain {job['gain'] or 0:.3f}, " if "correct" in job else ""
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in job["seconds"].items())
    return f"{name}: {job['bits_per_weight']:.3f} bpw, {right}KL {job['kl']:.5f} ({seconds} s)"


if __name__ == "__main__":
    main()

"""Tokens a second on a CPU: the embedded engine against plain transformers with the merged models.

    python benchmarks/serving/cpu.py [--repeats 5] [--json benchmarks/results/serving-cpu.json]

The example family of 2 M parameters, its four experts compressed data-free. One user asks one expert; 32 users ask
four experts at once. The peer is `generate` of transformers with the same merged models in float32: a batch of one, and
a padded batch for each expert, one after the other. All answers are greedy and have as many tokens, and both sides have
to give the same. They take turns in one process, each with one thread, which suits models of this size best; kept is
the best of several runs, by the clock and by the process's own CPU time, which other work on the machine changes less.
Then all of it again beside a busy process on every core, and a distillation of a few steps alone and beside them.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import meswitch  # before torch: see `meswitch.cpu`

FAMILY = Path(__file__).parents[2] / "examples" / "family"
EXPERTS = ("math", "code", "instruct", "sql")
USERS = (1, 32)
DISTILL = """
import sys, time, meswitch
from meswitch import compress
started = time.perf_counter()
compress(*sys.argv[1:4], bits=2, distill=4, calibration=sys.argv[4])
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each answer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), options.tokens, options.repeats)
    for row in found["rows"]:
        print(json.dumps(row))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(room: Path, tokens: int, repeats: int) -> dict[str, Any]:
    """All rows, and where they were measured."""
    import torch

    torch.set_num_threads(1)
    deltas = {name: room / name for name in EXPERTS}
    for name, delta in deltas.items():
        meswitch.compress(FAMILY / "base", FAMILY / name, delta)
    models = {name: meswitch.load_merged(FAMILY / "base", delta) for name, delta in deltas.items()}
    cores = len(os.sched_getaffinity(0))
    rows = []
    with meswitch.Engine(FAMILY / "base", deltas, device="cpu") as engine:
        for tokenizer in engine.tokenizers.values():
            tokenizer.ends = []  # all answers are equally long
        asked = questions(max(USERS), engine)
        for busy in (0, cores):
            with busy_processes(busy):
                for users in USERS:
                    rows += against_each_other(engine, models, asked[:users], tokens, repeats, busy)
        memory = engine.memory()
    for busy in (0, cores):
        with busy_processes(busy):
            rows.append({"what": "distillation", "busy": busy, "seconds": round(distillation(room / str(busy)), 1)})
    names = ("torch", "transformers")
    meta = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": processor(),
        "cores": cores,
        "load": round(os.getloadavg()[2], 1),
        "tokens": tokens,
        "repeats": repeats,
        "merged_bytes": memory["merged"],
        "base_bytes": memory["base"],
        "versions": {"meswitch": meswitch.__version__} | {name: version(name) for name in names},
    }
    return {"meta": meta, "rows": rows}


def questions(count: int, engine: Any) -> list[tuple[str, list[int]]]:
    """Experts in turn, each with a question of its own domain, as tokens."""
    from meswitch_lab.toy import draw

    drawn = {name: draw(name, -(-count // len(EXPERTS)), 7) for name in EXPERTS}
    asked = []
    for number in range(count):
        name = EXPERTS[number % len(EXPERTS)]
        message = {"role": "user", "content": drawn[name][number // len(EXPERTS)].prompt}
        asked.append((name, engine.tokenizers[name].encode([message])))
    return asked


def against_each_other(
    engine: Any, models: dict[str, Any], asked: list[tuple[str, list[int]]], tokens: int, repeats: int, busy: int
) -> list[dict[str, Any]]:
    """A row for each side. Raises SystemExit if their answers differ."""

    def ours() -> list[tuple[int, ...]]:
        names, prompts = [name for name, _ in asked], [prompt for _, prompt in asked]
        return [answer.tokens for answer in engine.generate(prompts, model=names, max_new_tokens=tokens)]

    sides: dict[str, Callable[[], list[tuple[int, ...]]]] = {
        "embedded": ours,
        "transformers": lambda: plain(models, asked, tokens),
    }
    answers = {name: side() for name, side in sides.items()}  # warm
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    if same < 0.9 * len(asked):  # padding moves logits a little: a near tie may go the other way
        raise SystemExit(f"{len(asked) - same} of {len(asked)} answers are not the merged models'")
    best = {name: {"tokens_per_s": 0.0, "tokens_per_cpu_s": 0.0} for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            clock, cpu = time.perf_counter(), time.process_time()
            count = sum(map(len, side()))
            rates = (count / (time.perf_counter() - clock), count / (time.process_time() - cpu))
            for key, rate in zip(best[name], rates, strict=True):
                best[name][key] = max(best[name][key], round(rate, 1))
    what = {"what": "serving", "users": len(asked), "experts": len({name for name, _ in asked}), "busy": busy}
    return [what | {"engine": name, "same_answers": same} | rates for name, rates in best.items()]


def plain(models: dict[str, Any], asked: list[tuple[str, list[int]]], tokens: int) -> list[tuple[int, ...]]:
    """Each expert's questions in a batch, padded on the left."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=1)
    answers: dict[int, tuple[int, ...]] = {}
    for expert, model in models.items():
        model.generation_config = GenerationConfig()
        mine = [(number, prompt) for number, (name, prompt) in enumerate(asked) if name == expert]
        if not mine:
            continue
        width = max(len(prompt) for _, prompt in mine)
        ids = torch.tensor([[1] * (width - len(prompt)) + prompt for _, prompt in mine])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for _, prompt in mine])
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        answers |= {number: tuple(row) for (number, _), row in zip(mine, out[:, width:].tolist(), strict=True)}
    return [answers[number] for number in range(len(asked))]


def distillation(out: Path) -> float:
    """Seconds for a few steps, in a process of its own with the threads that the package chooses."""
    command = [sys.executable, "-c", DISTILL, FAMILY / "base", FAMILY / "math", out, FAMILY / "calibration/math.jsonl"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()

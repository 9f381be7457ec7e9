"""A base in 8 or 4 bits in the embedded engine on a GPU: its codes held, beside the same base restored in 16 bit.

    python benchmarks/serving/quantised.py --work DIR [--kind int8] [--layers 32] [--tokenizer examples/family/base]
        [--json FILE]

A base of Mistral-7B's shapes with random weights is quantised by `meswitch quantize`, and one fine-tune of it is
compressed over that and served under several names. Each engine opens in a process of its own. Rows: what it says of
its memory, and what torch has allocated; milliseconds a step and tokens a second, as of `serving/engine.py`; time to
the first token of a prompt of 512. At last the same questions are asked of both, each alone and all at once: how many
tokens agree until the first that does not, and how far apart the log probabilities of the prompts' tokens are. What
asking alone or at once makes of one engine's answers is the measure for both. Random weights have many near ties.

One kind a run, of which `--prepare` is the first half; a file that has rows of others keeps them. Whatever lies in DIR
already is not made again.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

import meswitch
import meswitch.engine.engine as opening
from benchmarks.common import synthetic
from benchmarks.common.generated import RESULTS
from benchmarks.serving import engine as serving
from benchmarks.serving.engine import Row, ask, copy_bandwidth, measured, measured_on, time_to_first
from meswitch import Engine
from meswitch.engine.coded import coded_layers, codes_bytes
from meswitch.quantised import quantise

NAMES = serving.NAMES[:8]
HELD, RESTORED = "held", "restored"
STEPS = ((1, 1), (1, 0), (8, 4), (32, 8), (32, 0), (128, 8))  # requests, experts; 0 is the base
QUESTIONS, LENGTH, NEW = 8, 40, 24
Answers = dict[str, list[list[Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and artifacts are written, or are")
    parser.add_argument("--kind", choices=("int8", "fp8", "int4"), default="int8")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokenizer", type=Path, default=Path("examples/family/base"))
    parser.add_argument("--json", type=Path, default=RESULTS / "quantised-base-h200.json")
    parser.add_argument("--prepare", action="store_true", help="write what is measured, and measure nothing")
    parser.add_argument("--as-engine", choices=(HELD, RESTORED), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_engine:
        serve(options.work, options.kind, options.as_engine)
        return
    prepare(options.work, options.kind, options.layers, options.tokenizer)
    if options.prepare:
        return
    report = json.loads(options.json.read_text()) if options.json.is_file() else {"rows": []}
    report["meta"] = measured_on(options.layers, copy_bandwidth())
    torch.cuda.empty_cache()
    rows = [row for row in report["rows"] if row["kind"] != options.kind]
    answers: dict[str, Answers] = {}
    for how in (HELD, RESTORED):
        command = [sys.executable, __file__, "--work", str(options.work), "--kind", options.kind, "--as-engine", how]
        subprocess.run(command, check=True)
        found = json.loads(told(options.work, options.kind, how).read_text())
        rows += found["rows"]
        answers[how] = found["answers"]
        options.json.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    for what, one, other in (
        ("held against restored, alone", answers[HELD]["alone"], answers[RESTORED]["alone"]),
        ("held against restored, at once", answers[HELD]["at once"], answers[RESTORED]["at once"]),
        ("restored, alone against at once", answers[RESTORED]["alone"], answers[RESTORED]["at once"]),
    ):
        row = {"kind": options.kind, "compared": what} | agreement(one, other)
        print(json.dumps(row), flush=True)
        rows.append(row)
    options.json.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")


def prepare(work: Path, kind: str, layers: int, tokenizer: Path) -> None:
    """Write the base, the base in codes, and the artifact over it; the expert stays for another kind's artifact."""
    written = work / "written"
    if not written.exists():
        started = time.perf_counter()
        config = synthetic.MODELS["mistral-7b"] | {"num_hidden_layers": layers}
        synthetic.write_pair(work, config, int(3e9), tokenizer=tokenizer, device="cuda")
        written.touch()
        print(f"checkpoints: {time.perf_counter() - started:.0f} s", flush=True)
    if not (work / kind).is_dir():
        started = time.perf_counter()
        quantise(work / "base", work / kind, kind)
        print(f"quantised: {time.perf_counter() - started:.0f} s", flush=True)
    if not (work / f"artifact-{kind}").is_dir():
        started = time.perf_counter()
        meswitch.compress(work / kind, work / "expert", work / f"artifact-{kind}", device="cuda")
        print(f"compressed: {time.perf_counter() - started:.0f} s", flush=True)


def told(work: Path, kind: str, how: str) -> Path:
    """Where the process of an engine leaves what it found."""
    return work / f"{kind}-{how}.json"


def serve(work: Path, kind: str, how: str) -> None:
    """Open an engine, measure it, and ask it the questions."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("meswitch").setLevel(logging.DEBUG)
    if how == RESTORED:
        opening.hold_codes = lambda *_, **__: None  # as where no kernels run
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    rows: list[Row] = []

    def keep(row: Row) -> None:
        row = {"kind": kind, "base": how} | row
        print(json.dumps(row), flush=True)
        rows.append(row)

    started = time.perf_counter()
    experts = dict.fromkeys(NAMES, work / f"artifact-{kind}")
    with Engine(work / kind, experts, device="cuda", slots=len(NAMES)) as engine:
        ready = time.perf_counter() - started
        held = len(list(coded_layers(engine.model)))
        if (held > 0) != (how == HELD):
            raise SystemExit(f"{held} layers are held in 8 bits where they should be {how}: see the log above")
        memory = engine.memory()
        keep(
            {
                "layers_in_codes": held,
                "ready_s": round(ready, 1),
                "memory": memory,
                "codes": codes_bytes(engine.model),
                "allocated": torch.cuda.memory_allocated(),
                "by_turns": list(engine.by_turns),
            }
        )
        size = max(expert.bytes for expert in engine.store.residency())
        for name in NAMES:  # what a load takes is not what is measured here
            engine.store.release(engine.store.acquire(name))
        for requests, asked in STEPS:
            names = NAMES[:asked] or ["base"]
            row = measured(lambda new, r=requests, n=names: ask(engine, r, n, new), requests)
            floor = round(1000 * (memory["base"] + size * min(asked, requests)) / bandwidth, 2)
            keep({"requests": requests, "experts": asked} | row | {"floor_ms": floor})
        for prompt in (24, 512, 2000):
            times = [time_to_first(engine, NAMES[0], prompt) for _ in range(6)]
            first, usual = round(1000 * times[0], 1), round(1000 * sorted(times)[2], 1)
            keep({"requests": 1, "experts": 1, "prompt": prompt, "ttft_ms": usual, "ttft_first_ms": first})
        found = {"rows": rows, "answers": answered(engine)}
    told(work, kind, how).write_text(json.dumps(found))


def answered(engine: Engine) -> Answers:
    """Tokens and the log probabilities of the prompts' tokens, of questions that are asked alone and at once."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 1000, (LENGTH,), generator=draw).tolist() for _ in range(QUESTIONS)]
    models = [("base", NAMES[0])[number % 2] for number in range(QUESTIONS)]
    options: dict[str, Any] = {"max_new_tokens": NEW, "ignore_eos": True, "prompt_logprobs": 0}
    alone = [engine.generate([p], model=m, **options)[0] for p, m in zip(prompts, models, strict=True)]
    at_once = engine.generate(prompts, model=models, **options)
    return {
        way: [[list(a.tokens), [t.logprob for t in a.prompt_logprobs if t is not None]] for a in answers]
        for way, answers in (("alone", alone), ("at once", at_once))
    }


def agreement(one: list[list[Any]], other: list[list[Any]]) -> Row:
    """How far two lists of answers to the same questions agree."""
    until, gaps = [], []
    for (tokens, logprobs), (others, other_logprobs) in zip(one, other, strict=True):
        pairs = list(zip(tokens, others, strict=True))
        until.append(next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs)))
        gaps += [abs(a - b) for a, b in zip(logprobs, other_logprobs, strict=True)]
    return {
        "answers": len(until),
        "tokens": NEW,
        "agree_until": until,
        "logprob_gap_mean": round(sum(gaps) / len(gaps), 4),
        "logprob_gap_most": round(max(gaps), 4),
    }


if __name__ == "__main__":
    with torch.no_grad():
        main()

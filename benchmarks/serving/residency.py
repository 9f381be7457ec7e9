"""Many experts, few slots: what requests wait for while experts come and go.

    python benchmarks/serving/residency.py [--experts 128] [--slots 16] [--json benchmarks/results/residency-cpu.json]

The four experts of the example family (2 M parameters), each under many names with an artifact of its own on disk, so
that none shares another's bytes. Requests arrive at random (Poisson), or as many at once every few seconds (bursts);
which expert each asks is drawn from a Zipf distribution. Beside them, in the same run: as many experts as there are
slots, the base alone, and the same 128 experts by turns, one whole merged model in memory at a time.

TTFT is the time to a request's first token, TPOT that between later tokens. A hit found its expert in a slot.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import meswitch  # before torch: see `meswitch.cpu`
from meswitch import Engine, SamplingParams

FAMILY = Path(__file__).parents[2] / "examples" / "family"
KINDS = ("math", "code", "instruct", "sql")
PROMPT = "Tom has 23 apples. Tom buys 4 bags with 5 apples each. How many now?"
BURST = 4.0  # seconds between two bursts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second, on average")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent: 0 asks all experts alike")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, for each row")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each answer")
    parser.add_argument("--host-experts", type=int, default=48, help="experts that the host tier has room for")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(measure(Path(scratch), options))
    for row in rows:
        print(json.dumps(row))
    names = ("meswitch", "torch", "transformers")
    meta = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in names},
        **{key: value for key, value in vars(options).items() if key != "json"},
    }
    if options.json:
        options.json.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


def measure(room: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows, one after the other."""
    experts = {}
    for number in range(options.experts):
        kind = KINDS[number % len(KINDS)]
        if not (room / kind).is_dir():
            meswitch.compress(FAMILY / "base", FAMILY / kind, room / kind)
        experts[f"{kind}-{number}"] = shutil.copytree(room / kind, room / f"artifact-{number}")
    some = dict(list(experts.items())[: options.slots])
    largest = max(sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in experts.values())
    settings = {"slots": options.slots, "host_bytes": int(options.host_experts * largest * 1.1), "max_queue": 10_000}
    for what, served, arrivals, runner in (
        ("base alone", {}, "poisson", "batch"),
        ("as many experts as slots", some, "poisson", "batch"),
        ("many experts", experts, "poisson", "batch"),
        ("many experts", experts, "bursts", "batch"),
        ("many experts, whole models by turns", experts, "poisson", "turns"),
    ):
        with Engine(FAMILY / "base", served, device="cpu", runner=runner, **settings) as engine:
            yield {"what": what, "arrivals": arrivals, "experts": len(served), **run(engine, served, arrivals, options)}


def run(engine: Engine, experts: dict[str, Path], arrivals: str, options: argparse.Namespace) -> dict[str, Any]:
    """One load on one engine."""
    draw = random.Random(1)
    names = list(experts) or [engine.base_name]
    weights = [1 / (rank + 1) ** options.zipf for rank in range(len(names))]
    for name in names[: engine.store.slot_count]:  # the first steps are not what is measured
        engine.generate([PROMPT], model=name, max_new_tokens=2)
    loads, evictions = engine.store.loads, engine.store.evictions
    asked, start, now = [], time.perf_counter(), 0.0
    while now < options.seconds:
        count = 1 if arrivals == "poisson" else round(options.rate * BURST)
        for name in draw.choices(names, weights, k=count):
            resident = {place.expert for place in engine.store.residency() if place.place == "device"}
            params = SamplingParams(max_new_tokens=options.tokens)
            asked.append((name in resident or not experts, engine.submit(PROMPT, model=name, params=params)))
        now += draw.expovariate(options.rate) if arrivals == "poisson" else BURST
        time.sleep(max(0.0, start + now - time.perf_counter()))
    answers, failed = [], 0
    for hit, request in asked:
        try:
            answers.append((hit, request.result(600)))
        except meswitch.errors.MeswitchError:
            failed += 1
    seconds = time.perf_counter() - start
    ttft = [answer.ttft for _, answer in answers]
    tpot = [(a.duration - a.ttft) / (len(a.tokens) - 1) for _, a in answers if len(a.tokens) > 1]
    return {
        "requests": len(asked),
        "failed": failed,
        "tokens_per_s": round(sum(len(answer.tokens) for _, answer in answers) / seconds, 1),
        "ttft_ms": percentiles(ttft),
        "ttft_of_hits_ms": percentiles([answer.ttft for hit, answer in answers if hit]),
        "tpot_ms": percentiles(tpot),
        "hits": round(sum(hit for hit, _ in asked) / len(asked), 3),
        "loads": engine.store.loads - loads,
        "evictions": engine.store.evictions - evictions,
        "moved_mb": round((engine.store.loads - loads) * engine.store.slot_bytes / 1e6, 1),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    ordered = sorted(seconds) or [0.0]
    return {f"p{p}": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 1) for p in (50, 95, 99)}


if __name__ == "__main__":
    main()

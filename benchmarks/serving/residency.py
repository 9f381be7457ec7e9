"""Many experts, few slots: what requests wait for while experts come and go.

    python benchmarks/serving/residency.py [--experts 128] [--slots 16] [--json benchmarks/results/residency-cpu.json]
    python benchmarks/serving/residency.py --model mistral-7b --work DIR [--layers 32] [--seconds 60] [--json FILE]

Without `--model`: the four experts of the example family (2 M parameters), each under many names with an artifact of
its own on disk. With it: a base of true shapes with random weights in DIR, one fine-tune of it, compressed, and three
artifacts more of other numbers. Each of the 128 experts has a directory and a manifest of its own; its tensors' files
are links to those of one of the four, so all of them are in the page cache, and a disk's own time comes on top. Inside
meswitch nothing is shared: an expert is its name and its manifest.

Requests arrive at random (Poisson), or as many at once every few seconds (bursts); which expert each asks is drawn from
a Zipf distribution. Beside them, in the same run: the base alone, as many experts as there are slots, and on a CPU the
same 128 experts by turns, one whole merged model in memory at a time. One engine answers all but the last, row after
row. TTFT is the time to a request's first token, TPOT that between later tokens. A hit found its expert in a slot.

With `--model` also what loads cost others: the copy into a slot beside a plain copy of as many bytes from page-locked
memory, and the TPOT of 8 running answers alone and while experts are loaded one after the other without a pause, from
host memory and from files. A row is in the JSON file as soon as it is measured.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import meswitch  # before torch: see `meswitch.cpu`

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

import torch

from benchmarks.common import synthetic
from meswitch import Artifact, Chunk, Engine, SamplingParams
from meswitch.artifact.manifest import MANIFEST_NAME
from meswitch.artifact.writer import rewrite
from meswitch.codec import PackedDelta
from meswitch.slots.layout import Layout
from meswitch.threads import SWITCH_SECONDS
from meswitch.tokenizer import Prompt

FAMILY = Path(__file__).parents[2] / "examples" / "family"
KINDS = ("math", "code", "instruct", "sql")
ARRIVALS = ("poisson", "bursts")
QUESTION = "Tom has 23 apples. Tom buys 4 bags with 5 apples each. How many now?"
SHORTEST, LONGEST = 24, 200  # tokens of a random prompt
BURST = 4.0  # seconds between two bursts
STREAMS = 8
_LATE = 120.0  # seconds after the last arrival, within which an answer must be there
_COPIES = 8
_FIRST = 8  # tokens of a stream that are not counted: others' prompts are in their steps
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Served:
    """What is served, and how it is asked.

    Args:
        base: its directory.
        experts: their directories by name, those that are asked most first.
        say: makes a prompt.
        params: of every request.
    """

    base: Path
    experts: dict[str, Path]
    say: Callable[[random.Random], Prompt]
    params: SamplingParams


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=synthetic.MODELS, help="shapes of random weights, instead of the family")
    parser.add_argument("--layers", type=int, help="fewer layers of it")
    parser.add_argument("--work", type=Path, help="where its checkpoint and artifacts are written, or are")
    parser.add_argument("--tokenizer", type=Path, default=FAMILY / "base")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second, on average")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent: 0 asks all experts alike")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, for each row")
    parser.add_argument("--tokens", type=int, help="new tokens of each answer: 24 of the family, 64 of a random model")
    parser.add_argument("--stream-seconds", type=float, default=5.0, help="of each row of running answers")
    parser.add_argument("--host-experts", type=int, default=40, help="experts that the host tier has room for")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.model and options.work is None:
        parser.error("--model needs --work")
    if not STREAMS < options.slots < options.host_experts < options.experts:
        parser.error(f"--slots: more than {STREAMS}; --host-experts: more than that; --experts: more than that")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.tokens = options.tokens or (64 if options.model else 24)
    found: dict[str, Any] = {"meta": measured_on(options), "rows": []}

    def keep(row: Row) -> None:
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        served = random_model(options) if options.model else example_family(Path(scratch), options)
        print(f"base and {len(served.experts)} experts: {time.perf_counter() - started:.0f} s", flush=True)
        measure(served, options, keep)


def measured_on(options: argparse.Namespace) -> Row:
    on_gpu = options.device != "cpu"
    names = ("torch", "triton", "transformers") if on_gpu else ("torch", "transformers")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        **({"card": torch.cuda.get_device_name()} if on_gpu else {}),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {"meswitch": meswitch.__version__} | {name: version(name) for name in names},
        **{key: value for key, value in settings.items() if key not in ("json", "work", "tokenizer", "device")},
    }


def example_family(room: Path, options: argparse.Namespace) -> Served:
    """The family's experts under many names, each with files of its own."""
    experts = {}
    for number in range(options.experts):
        kind = KINDS[number % len(KINDS)]
        if not (room / kind).is_dir():
            meswitch.compress(FAMILY / "base", FAMILY / kind, room / kind)
        experts[f"{kind}-{number}"] = shutil.copytree(room / kind, room / f"artifact-{number}")
    params = SamplingParams(max_new_tokens=options.tokens)
    return Served(FAMILY / "base", experts, lambda draw: QUESTION, params)


def random_model(options: argparse.Namespace) -> Served:
    """A base of random weights, and experts that share four artifacts' files. What is there is not made again."""
    config = dict(synthetic.MODELS[options.model])
    config["num_hidden_layers"] = options.layers = options.layers or config["num_hidden_layers"]
    first = synthetic.compressed(options.work, config, tokenizer=options.tokenizer, device=options.device)
    kinds = [first]
    for number in range(1, len(KINDS)):
        kinds.append(options.work / f"artifact-{number}")
        if not kinds[-1].is_dir():
            rolled(first, kinds[-1], number)
    if options.device != "cpu":
        torch.cuda.empty_cache()
    experts = {}
    for number in range(options.experts):
        experts[f"e{number}"] = linked(kinds[number % len(kinds)], options.work / "experts" / f"e{number}")

    def say(draw: random.Random) -> Prompt:
        return [draw.randrange(5, config["vocab_size"]) for _ in range(draw.randint(SHORTEST, LONGEST))]

    return Served(options.work / "base", experts, say, SamplingParams(max_new_tokens=options.tokens, ignore_eos=True))


def rolled(source: Path, out: Path, rows: int) -> None:
    """Another artifact of the same form: each row of a delta stands so many rows further down."""
    artifact = Artifact.open(source)
    changed = {}
    for name in artifact.manifest.tensors:
        delta = artifact.read(name)
        if isinstance(delta, PackedDelta):
            moved = {part: getattr(delta, part).roll(rows, 0) for part in ("packed", "scale", "salient_weight")}
            changed[name] = dataclasses.replace(delta, **moved)
    rewrite(artifact, out, changed, artifact.manifest.method, overwrite=False)


def linked(source: Path, out: Path) -> Path:
    """A directory of its own, with a manifest of its own, over the same files."""
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not (out / file.name).exists():
            (shutil.copyfile if file.name == MANIFEST_NAME else os.link)(file, out / file.name)
    return out


def measure(served: Served, options: argparse.Namespace, keep: Callable[[Row], None]) -> None:
    """All rows, one after the other."""
    kinds = [Artifact.open(path) for path in list(served.experts.values())[: len(KINDS)]]
    size = max(Layout.of(artifact, kernel=options.device != "cpu").nbytes for artifact in kinds)
    settings = {
        "device": options.device,
        "slots": options.slots,
        "host_bytes": int((options.host_experts + 0.5) * size),
        "max_queue": 10_000,
    }
    experts = list(served.experts)
    sys.setswitchinterval(SWITCH_SECONDS)
    started = time.perf_counter()
    with Engine(served.base, served.experts, runner="batch", **settings) as engine:
        keep({"what": "ready", "seconds": round(time.perf_counter() - started, 1), "memory": engine.memory()})
        keep({"what": "base alone"} | arrivals(engine, served, [], "poisson", options))
        full = {}
        for kind in ARRIVALS:
            full[kind] = arrivals(engine, served, experts[: options.slots], kind, options)
            keep({"what": "as many experts as slots"} | full[kind])
        for kind in ARRIVALS:
            many = arrivals(engine, served, experts, kind, options)
            late = many["ttft_of_hits_ms"]["p95"] / full[kind]["ttft_of_hits_ms"]["p95"]
            keep({"what": "many experts"} | many | {"ttft_of_hits_p95_ratio": round(late, 2)})
        if options.model:  # of experts as small as the family's nothing but Python would be measured
            for row in loads(engine, served, options):
                keep(row)
    if options.device == "cpu":
        with Engine(served.base, served.experts, runner="turns", **settings) as engine:
            row = arrivals(engine, served, experts, "poisson", options)
        keep({"what": "many experts, whole models by turns"} | row)


def arrivals(engine: Engine, served: Served, experts: list[str], kind: str, options: argparse.Namespace) -> Row:
    """Requests for some experts, or for the base if there are none."""
    arriving, saying = random.Random(1), random.Random(f"{len(experts)} {kind}")
    names = experts or [engine.base_name]
    weights = [1 / (rank + 1) ** options.zipf for rank in range(len(names))]
    first = names[: engine.store.slot_count]  # loading them, and the first steps, are not what is measured
    engine.generate([served.say(saying) for _ in first], model=first, max_new_tokens=2)
    loads, evictions = engine.store.loads, engine.store.evictions
    asked, start, now = [], time.perf_counter(), 0.0
    while now < options.seconds:
        count = 1 if kind == "poisson" else round(options.rate * BURST)
        resident = {place.expert for place in engine.store.residency() if place.place == "device"}
        for name in arriving.choices(names, weights, k=count):
            request = engine.submit(served.say(saying), model=name, params=served.params)
            asked.append((name in resident or not experts, request))
        now += arriving.expovariate(options.rate) if kind == "poisson" else BURST
        time.sleep(max(0.0, start + now - time.perf_counter()))
    answers, failed, last = [], 0, time.perf_counter() + _LATE
    for hit, request in asked:
        try:
            answers.append((hit, request.result(max(0.0, last - time.perf_counter()))))
        except meswitch.MeswitchError as error:
            engine.cancel(request)
            print(f"{request.model}: {error}", flush=True)
            failed += 1
    seconds = time.perf_counter() - start
    tpot = [(a.duration - a.ttft) / (len(a.tokens) - 1) for _, a in answers if len(a.tokens) > 1]
    moved = (engine.store.loads - loads) * engine.store.slot_bytes
    return {
        "arrivals": kind,
        "experts": len(experts),
        "requests": len(asked),
        "failed": failed,
        "tokens_per_s": round(sum(len(answer.tokens) for _, answer in answers) / seconds, 1),
        "ttft_ms": percentiles([answer.ttft for _, answer in answers]),
        "ttft_of_hits_ms": percentiles([answer.ttft for hit, answer in answers if hit]),
        "tpot_ms": percentiles(tpot),
        "hits": round(sum(hit for hit, _ in asked) / len(asked), 3),
        "loads": engine.store.loads - loads,
        "evictions": engine.store.evictions - evictions,
        "moved_mb": round(moved / 1e6, 1),
    }


def loads(engine: Engine, served: Served, options: argparse.Namespace) -> Iterator[Row]:
    """What a load takes, and what it costs those who are answered meanwhile."""
    yield copies(engine, list(served.experts), options.device)
    what = f"{STREAMS} running answers"
    alone = streams(engine, served, None, options.stream_seconds)
    yield {"what": what} | alone
    for source, place in (("host memory", "host"), ("files", "disk")):
        row = streams(engine, served, place, options.stream_seconds)
        # the tokens of one chunk come at once, which a tiny model's may all do
        ratio = {name: round(ms / max(alone["tpot_ms"][name], 0.01), 3) for name, ms in row["tpot_ms"].items()}
        yield {"what": f"{what}, loads from {source}"} | row | {"tpot_ratio": ratio}


def copies(engine: Engine, experts: list[str], device: str) -> Row:
    """The copy from host memory into a slot, and a plain one of as many bytes from page-locked memory."""
    ring = deque(experts)
    found = [load_next(engine, ring, "host") for _ in range(_COPIES)]
    copied = [one["copy_s"] for one in found if one is not None]
    size = engine.store.slot_bytes
    source = torch.empty(size, dtype=torch.uint8, pin_memory=device != "cpu")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    plain = []
    for _ in range(_COPIES):
        started = time.perf_counter()
        target.copy_(source)
        if target.is_cuda:
            torch.cuda.synchronize()
        plain.append(time.perf_counter() - started)
    ours, theirs = statistics.median(copied), statistics.median(plain)
    return {
        "what": "copy into a slot",
        "gigabytes": round(size / 1e9, 4),
        "copies": len(copied),
        "gb_per_s": round(size / ours / 1e9, 2),
        "best_gb_per_s": round(size / min(copied) / 1e9, 2),
        "plain_gb_per_s": round(size / theirs / 1e9, 2),
        "share": round(theirs / ours, 3),
    }


def load_next(engine: Engine, ring: deque[str], place: str) -> Row | None:
    """Bring the next expert that is in some place to a slot, while nobody else loads; None if none is there."""
    places = {one.expert: one.place for one in engine.store.residency()}
    for _ in range(len(ring)):
        ring.rotate(-1)
        if places[ring[-1]] == place:
            copying, started = engine.store.load_seconds, time.perf_counter()
            engine.store.release(engine.store.acquire(ring[-1]))
            return {"seconds": time.perf_counter() - started, "copy_s": engine.store.load_seconds - copying}
    return None


def streams(engine: Engine, served: Served, place: str | None, seconds: float) -> Row:
    """Times between the tokens of long answers of the first experts.

    Args:
        place: where the others come from, which are loaded meanwhile; None to load none.
        seconds: it takes.
    """
    running, saying = list(served.experts)[:STREAMS], random.Random(2)
    engine.generate([served.say(saying) for _ in running], model=running, max_new_tokens=2)  # loads them
    gaps, done, found = list[float](), threading.Event(), list[Row]()
    ring = deque(list(served.experts)[STREAMS:])

    def load_all() -> None:
        while place is not None and not done.is_set() and (row := load_next(engine, ring, place)) is not None:
            found.append(row)

    started = time.perf_counter()
    until = started + seconds
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_all)
        try:
            while not gaps or time.perf_counter() < until:
                gaps += long_answers(engine, served, running, saying, until)
                until = until if gaps else time.perf_counter() + seconds
        finally:
            done.set()
        loading.result()
    took = time.perf_counter() - started
    row: Row = {"streams": len(running), "tokens": len(gaps), "tpot_ms": percentiles(gaps, mean=True)}
    if found:
        row |= {
            "loads": len(found),
            "loads_per_s": round(len(found) / took, 2),
            "load_ms": percentiles([one["seconds"] for one in found]),
            "copy_gb_per_s": round(
                engine.store.slot_bytes / statistics.median(one["copy_s"] for one in found) / 1e9, 2
            ),
        }
    return row


def long_answers(
    engine: Engine, served: Served, running: Sequence[str], saying: random.Random, until: float
) -> list[float]:
    """One answer of each expert, to its end or until some time. Seconds between tokens, of all but the first ones."""
    times: list[list[float]] = [[] for _ in running]

    def heard(number: int) -> Callable[[Chunk], None]:
        return lambda chunk: times[number].extend([time.perf_counter()] * chunk.tokens)

    room = engine.kv_tokens // len(running)
    requests = []
    for number, name in enumerate(running):
        length = min(engine.max_length(name), room) - 2 * LONGEST
        params = SamplingParams(max_new_tokens=length, ignore_eos=True)
        requests.append(engine.submit(served.say(saying), model=name, params=params, on_chunk=heard(number)))
    while not all(request.done for request in requests) and time.perf_counter() < until:
        time.sleep(0.01)
    for request in requests:
        engine.cancel(request)
    return [later - earlier for own in times for earlier, later in itertools.pairwise(own[_FIRST:])]


def percentiles(seconds: Sequence[float], *, mean: bool = False) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds, and the mean."""
    ordered = sorted(seconds) or [0.0]
    found = {f"p{p}": 1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 95, 99)}
    if mean:
        found["mean"] = 1000 * statistics.mean(ordered)
    return {name: round(value, 2) for name, value in found.items()}


if __name__ == "__main__":
    main()

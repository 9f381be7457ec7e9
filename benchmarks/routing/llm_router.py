"""The LLM router on real queries: as it is, fine-tuned, and with an expert that it knows by description alone.

    python benchmarks/routing/llm_router.py --model DIR --train train.jsonl --dev dev.jsonl --work DIR --out FILE

Trains on `--train` only. A tenth of it is kept for the figures called `held-out`, and a tenth of the rest for the
calibration; `--dev` should come from other sources, and `--leave` leaves some of the training file's own out, to choose
settings by. Every figure is written as soon as it is there. A router that is in `--work` is not trained again, and an
interrupted training goes on, so several runs with `--only-train` can train side by side and a last one measures.
Experts and descriptions are the example family's.
"""

import argparse
import dataclasses
import fcntl
import json
import platform
import statistics
import time
import tomllib
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from meswitch import __version__
from meswitch.checkpoint import sha256_file
from meswitch.router import evaluate_router, load_router, open_llm, read_rows
from meswitch.router.data import hold_out
from meswitch.router.evaluate import latency
from meswitch.router.llm import LlmRouter, LlmSettings
from meswitch.router.llm_train import calibrate, train_llm_router

FAMILY = Path(__file__).parents[2] / "examples" / "family" / "family.toml"


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    known = descriptions()
    rows, held_out = test_split(read_rows(options.train, known), options.seed)
    dev = read_rows(options.dev, known) if options.dev else []
    data = {"held-out": subset(held_out, options.held_out_rows), "dev": subset(dev, options.dev_rows)}
    if options.leave:
        rows, unseen = leave(rows, options.leave)
        data = {"held-out": data["held-out"], "left-out": unseen}
    settings = LlmSettings(
        weights=options.weights,
        max_tokens=options.max_tokens,
        steps=options.steps,
        batch=options.batch,
        question=options.question,
        learning_rate=options.learning_rate,
        top=options.top,
        settle=options.settle,
        drop=options.drop,
        reword=options.reword,
        disguise=options.disguise,
        balance=options.balance,
        average=options.average,
        holdout=options.holdout,
        seed=options.seed,
    )
    _, calibration = hold_out(rows, settings.holdout, settings.seed)  # as training does
    bench = Bench(options)
    if "zero-shot" in options.parts:
        router = bench.router(rows, known, dataclasses.replace(settings, weights="reference"), "zero-shot")
        bench.measure(router, "zero-shot", data)
        averaged = orders(router, len(router.labels))
        bench.measure(calibrate(averaged, subset(calibration, 100)), "zero-shot-averaged", data, 100)
    if "tuned" in options.parts:
        kind = "left" if options.leave else "tuned"
        label = kind + ("" if settings.settle < 1 else "-one-order") + options.suffix
        router = bench.router(rows, known, settings, label)
        bench.measure(router, label, data)
    if "tuned" in options.parts and not options.leave:
        averaged = calibrate(orders(router, len(router.labels)), calibration if bench.gpu else subset(calibration, 100))
        bench.measure(averaged, f"{label}-averaged", data, 10**6 if bench.gpu else 100)
        bench.speed(router, label, held_out)
    for name in options.added if "added" in options.parts else ():
        fewer = {expert: text for expert, text in known.items() if expert != name}
        changed = dataclasses.replace(settings, steps=options.added_steps)
        label = f"without-{name}{options.suffix}"
        router = bench.router([row for row in rows if row.domain != name], fewer, changed, label)
        bench.measure(router, label, {kind: [r for r in some if r.domain != name] for kind, some in data.items()})
        bench.measure(router.with_descriptions(known), f"added-{name}{options.suffix}", data)


def descriptions() -> dict[str, str]:
    """Expert -> description; read without pydantic, which not every machine with a GPU has."""
    return {expert["name"]: expert["description"] for expert in tomllib.loads(FAMILY.read_text())["expert"]}


def test_split(rows, seed: int):
    """(rows for training and calibration, a tenth that only figures are made of)."""
    return hold_out(rows, 0.1, seed + 1)


def leave(rows, sources):
    """(the rows of other sources, those of these)."""
    missing = set(sources) - {row.source for row in rows}
    if missing:
        raise SystemExit(f"--leave: no rows of {', '.join(sorted(missing))}")
    return [row for row in rows if row.source not in sources], [row for row in rows if row.source in sources]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory of a causal LM")
    parser.add_argument("--name", help="what the results call it (default: the directory's name)")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, help="rows of other sources; none: measure on held-out rows alone")
    parser.add_argument("--out", type=Path, required=True, help="JSON; figures of other models in it stay")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and the trained router")
    parser.add_argument("--parts", nargs="+", default=["zero-shot", "tuned", "added"])
    parser.add_argument("--only-train", action="store_true", help="leave the routers in --work, unmeasured")
    parser.add_argument("--suffix", default="", help="of the variants' names, for other settings")
    parser.add_argument("--weights", default="lora", choices=["lora", "full"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--question", type=int, default=4, help="rows that share one order of the options")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--top", type=float, default=1.0, help="share of the blocks that LoRA adapts, from the last")
    parser.add_argument("--settle", type=float, default=0.1, help="see LlmSettings; 1000 keeps one order throughout")
    parser.add_argument("--drop", type=float, default=LlmSettings().drop, help="see LlmSettings, as for the next four")
    parser.add_argument("--reword", type=float, default=LlmSettings().reword)
    parser.add_argument("--disguise", type=float, default=LlmSettings().disguise)
    parser.add_argument("--balance", type=float, default=LlmSettings().balance)
    parser.add_argument("--average", type=float, default=LlmSettings().average)
    parser.add_argument("--leave", nargs="+", help="sources to train without, and to choose settings by: `left-out`")
    parser.add_argument("--holdout", type=float, default=0.1, help="share of the training rows for the calibration")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--added", nargs="+", default=["math"], help="experts that a router only knows by description")
    parser.add_argument("--added-steps", type=int, default=100)
    parser.add_argument("--held-out-rows", type=int, default=10**6, help="to measure (default: all)")
    parser.add_argument("--dev-rows", type=int, default=10**6, help="to measure (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Bench:
    """One model's routers, and the file of results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.name = options.name or options.model.name
        self.gpu = options.device != "cpu"

    def router(self, rows, known, settings, label: str) -> LlmRouter:
        """As it is used: from the disk, in the dtype for the device. Trained first if it is not there."""
        options, place = self.options, self.options.work / f"{label}-router"
        if not place.exists():
            self.train(rows, known, settings, label).save(place)
        router = load_router(place, options.model, device=options.device, llm=options.model)
        if router.settings != settings:
            raise SystemExit(f"{place}: trained with other settings; remove it or take another --work")
        return router

    def train(self, rows, known, settings, label: str) -> LlmRouter:
        start = time.perf_counter()
        llm = open_llm(self.options.model)  # float32
        llm.model.to(self.options.device)

        def report(done: int, total: int, loss: float) -> None:
            if done % 25 == 0 or done == total:
                print(f"{label} {done}/{total} loss {loss:.4f} {time.perf_counter() - start:.0f} s", flush=True)

        router = train_llm_router(
            rows,
            known,
            llm,
            settings=settings,
            data_sha256=sha256_file(self.options.train),
            checkpoint=self.options.work / f"{label}-checkpoint",
            save_every=200 if self.gpu else 25,
            report=report,
        )
        print(label, router.calibration, flush=True)
        told = {"train_rows": len(rows), "seconds": time.perf_counter() - start}
        self.write(label, "calibration", dataclasses.asdict(router.calibration) | told, router)
        return router

    def measure(self, router: LlmRouter, label: str, data, most: int = 10**6) -> None:
        if self.options.only_train:
            return
        for kind, some in data.items():
            rows = subset(some, most)
            if not rows:  # no --dev
                continue
            if self.gpu:
                latency(router, rows)  # captures the graphs
            figures = evaluate_router(router, rows).to_dict() | {"rows": len(rows)}
            shown = ("accuracy", "per_domain", "ece", "auroc", "accepted_other", "latency_ms")
            print(label, kind, json.dumps({key: rounded(figures[key]) for key in shown}), flush=True)
            self.write(label, kind, figures, router)

    def speed(self, router: LlmRouter, label: str, rows) -> None:
        """One query at a time with and without graphs, and 64 together."""
        if self.options.only_train or not self.gpu:
            return
        found = {}
        for name, graphs in (("graphs", True), ("plain", False)):
            router.chooser.graphs = graphs
            latency(router, rows)
            found[name] = latency(router, rows)
        router.chooser.graphs = True
        batch = [row.query for row in rows[:64]]
        times = []
        for _ in range(10):
            start = time.perf_counter()
            router.route_batch(batch)
            times.append((time.perf_counter() - start) * 1e3 / len(batch))
        found["batch"] = {"queries": len(batch), "ms_a_query": statistics.median(times)}
        print(label, "speed", json.dumps(rounded(found)), flush=True)
        self.write(label, "speed", {"speed": found, "dtype": str(router.chooser.model.dtype)}, router)

    def write(self, label: str, data: str, figures: dict, router: LlmRouter) -> None:
        entry = {
            "model": self.name,
            "params": router.llm.info.parameters,
            "kind": "llm",
            "variant": label,
            "data": data,
            "weights": router.settings.weights,
            "settings": dataclasses.asdict(router.settings),
            **figures,
            "bytes": nbytes(router),
            **measured_on(self.options.device),
        }
        store(self.options.out, entry)


def store(out: Path, entry: dict) -> None:
    """Put a result into the file in the place of an older one; several programs may do so at once."""
    key = ("model", "variant", "data", "device")
    with open(out, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        results = json.loads(file.read() or '{"results": []}')["results"]
        kept = [old for old in results if any(old[name] != entry[name] for name in key)]
        file.truncate(0)
        file.write(json.dumps({"results": [*kept, entry]}, indent=1) + "\n")


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def orders(router: LlmRouter, count: int) -> LlmRouter:
    """The same router, averaging over more orders of the options."""
    other = router.with_descriptions(router.descriptions)
    other.settings = dataclasses.replace(router.settings, permutations=count)
    return other


def nbytes(router: LlmRouter) -> int:
    """Of the model's weights in memory."""
    return sum(value.numel() * value.element_size() for value in router.chooser.model.parameters())


def measured_on(name: str) -> dict:
    """Where and with what a figure was measured."""
    return {
        "device": device(name),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "meswitch": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def device(name: str) -> str:
    if name != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "cpu"


def subset(rows, count: int):
    """About `count` rows, as many of every domain and spread over its sources; always the same ones."""
    by_domain = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.source, row.query)):
        by_domain[row.domain].append(row)
    share = count // max(1, len(by_domain))
    chosen = []
    for domain in sorted(by_domain):
        members = by_domain[domain]
        step = max(1.0, len(members) / share)
        chosen += [members[int(i * step)] for i in range(min(share, len(members)))]
    return chosen


if __name__ == "__main__":
    main()

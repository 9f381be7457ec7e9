"""The LLM router on real queries: as it is, fine-tuned, and with an expert that it knows by description alone.

    python benchmarks/routing_llm.py --model DIR --train train.jsonl --dev dev.jsonl --out results.json

Trains on `--train` only (a tenth of it is held out for the calibration and measured as `held-out`), measures on `--dev`
too, which should come from other sources. Writes after every part, and a run that was interrupted goes on with the
training where it was. Experts and descriptions are the example family's.
"""

import argparse
import dataclasses
import json
import platform
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from meswitch.artifact import fingerprint
from meswitch.artifact.fingerprint import sha256_file
from meswitch.checkpoint import Checkpoint
from meswitch.family import Family
from meswitch.router import evaluate_router, read_rows
from meswitch.router.llm import LlmRouter
from meswitch.router.llm_train import calibrate, train_llm_router
from meswitch.router.records import LlmSettings, ModelInfo
from meswitch.router.split import hold_out
from meswitch.version import __version__

FAMILY = Path(__file__).parent.parent / "examples" / "family"


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    family = Family.load(FAMILY)
    descriptions = {expert.name: expert.description for expert in family.expert}
    rows = read_rows(options.train, descriptions)
    dev = read_rows(options.dev, descriptions) if options.dev else []
    settings = LlmSettings(
        weights=options.weights,
        max_tokens=options.max_tokens,
        steps=options.steps,
        batch=options.batch,
        question=options.question,
        learning_rate=options.learning_rate,
        top=options.top,
        settle=options.settle,
        holdout=options.holdout,
        seed=options.seed,
    )
    _, held_out = hold_out(rows, settings.holdout, settings.seed)
    bench = Bench(options)
    if "zero-shot" in options.parts:
        router = bench.train(rows, descriptions, dataclasses.replace(settings, weights="reference"), "zero-shot")
        bench.measure(router, "zero-shot", "dev", subset(dev, options.subset))
        averaged = orders(router, len(router.labels))
        bench.measure(calibrate(averaged, subset(held_out, 100)), "zero-shot-averaged", "dev-100", subset(dev, 100))
    if "tuned" in options.parts:
        label = "tuned" if settings.settle < 1 else "tuned-one-order"
        router = bench.train(rows, descriptions, settings, label)
        router.save(options.work / f"{label}-router")
        bench.measure(router, label, "held-out", subset(held_out, options.held_out_rows))
        bench.measure(router, label, "dev", subset(dev, options.dev_rows))
        bench.measure(orders(router, len(router.labels)), f"{label}-averaged", "dev-100", subset(dev, 100))
        bench.measure(router, label, "dev-100", subset(dev, 100))
    if "added" in options.parts:
        name = options.added
        known = {expert: text for expert, text in descriptions.items() if expert != name}
        fewer = [row for row in rows if row.domain != name]
        router = bench.train(fewer, known, dataclasses.replace(settings, steps=options.added_steps), f"without-{name}")
        updated = router.with_descriptions(descriptions)
        for kind, some in (("dev", subset(dev, options.subset)), ("held-out", subset(held_out, options.held_out_rows))):
            bench.measure(router, f"without-{name}", kind, [row for row in some if row.domain != name])
            bench.measure(updated, f"added-{name}", kind, some)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory of a causal LM")
    parser.add_argument("--name", help="what the results call it (default: the directory's name)")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, help="rows of other sources; none: measure on held-out rows alone")
    parser.add_argument("--out", type=Path, required=True, help="JSON; figures of other models in it stay")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and the trained router")
    parser.add_argument("--parts", nargs="+", default=["zero-shot", "tuned", "added"])
    parser.add_argument("--weights", default="lora", choices=["lora", "full"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--question", type=int, default=4, help="rows that share one order of the options")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--top", type=float, default=1.0, help="share of the blocks that LoRA adapts, from the last")
    parser.add_argument("--settle", type=float, default=0.1, help="see LlmSettings; 1000 keeps one order throughout")
    parser.add_argument("--holdout", type=float, default=0.1, help="share of the training rows that is held out")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--added", default="math", help="the expert that one router only knows by description")
    parser.add_argument("--added-steps", type=int, default=100)
    parser.add_argument("--subset", type=int, default=300, help="rows of dev for the slower parts")
    parser.add_argument("--held-out-rows", type=int, default=10**6, help="of the tuned router (default: all)")
    parser.add_argument("--dev-rows", type=int, default=10**6, help="of the tuned router (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Bench:
    """One model's routers, and the file of results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.name = options.name or options.model.name

    def train(self, rows, descriptions, settings, label):
        start = time.perf_counter()
        dtype = torch.float32 if self.options.device == "cpu" or settings.weights != "reference" else "auto"
        model = transformers.AutoModelForCausalLM.from_pretrained(self.options.model, dtype=dtype)
        model.to(self.options.device).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.options.model)
        count = sum(value.numel() for value in model.parameters())
        info = ModelInfo(str(self.options.model), fingerprint(Checkpoint.open(self.options.model)), count)

        def report(done: int, total: int, loss: float) -> None:
            print(f"{label} {done}/{total} loss {loss:.4f} {time.perf_counter() - start:.0f} s", flush=True)

        router = train_llm_router(
            rows,
            descriptions,
            model,
            tokenizer,
            info,
            settings=settings,
            data_sha256=sha256_file(self.options.train),
            checkpoint=self.options.work / f"{label}-checkpoint",
            save_every=25,
            report=report,
        )
        print(label, router.calibration, flush=True)
        self.write(label, "calibration", dataclasses.asdict(router.calibration) | {"train_rows": len(rows)}, router)
        return router

    def measure(self, router: LlmRouter, label: str, data: str, rows) -> None:
        if not rows:  # no --dev
            return
        figures = evaluate_router(router, rows).to_dict() | {"rows": len(rows)}
        print(label, data, {key: figures[key] for key in ("accuracy", "per_domain", "ece", "auroc")}, flush=True)
        self.write(label, data, figures, router)

    def write(self, label: str, data: str, figures: dict, router: LlmRouter) -> None:
        out = self.options.out
        stored = json.loads(out.read_text()) if out.exists() else {"results": []}
        entry = {
            "model": self.name,
            "params": router.info.parameters,
            "kind": "llm",
            "variant": label,
            "data": data,
            "weights": router.settings.weights,
            "settings": dataclasses.asdict(router.settings),
            **figures,
            "bytes": nbytes(router),
            "device": device(self.options.device),
            "threads": torch.get_num_threads(),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {
                "meswitch": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }
        key = ("model", "variant", "data", "device")
        kept = [old for old in stored["results"] if any(old[name] != entry[name] for name in key)]
        out.write_text(json.dumps({"results": [*kept, entry]}, indent=1) + "\n")


def orders(router: LlmRouter, count: int) -> LlmRouter:
    """The same router, averaging over more orders of the options."""
    other = router.with_descriptions(router.descriptions)
    other.settings = dataclasses.replace(router.settings, permutations=count)
    return other


def nbytes(router: LlmRouter) -> int:
    """Of the model's weights in memory."""
    return sum(value.numel() * value.element_size() for value in router.letters.model.parameters())


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

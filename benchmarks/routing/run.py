"""Measure the embedding router: encoders on real queries, sources left out, an expert of 16 examples, many experts.

    python benchmarks/routing/run.py --base examples/family/base --train train.jsonl --dev dev.jsonl \\
        --encoder minilm=DIR --encoder static=DIR

Rows are {"query", "domain", "source"} a line; train and dev should be of different sources. Training uses the train
file alone; `held_out` is 10 % of it, which the router of that figure has not seen. `left_out` trains without one
source of the train file at a time. Results go to benchmarks/results/routing.json, one entry an encoder; entries of
other encoders stay.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch

from meswitch.router import OTHER, Encoder, Row, add_experts, evaluate_router, open_encoder, read_rows, train_router
from meswitch.router.data import without_labels
from meswitch.router.train import default_settings, sources_of

RESULTS = Path(__file__).parents[1] / "results" / "routing.json"
EXPERTS = ["math", "code", "instruct", "sql"]
NEW = 16  # examples of a fifth expert


class Remembering:
    """An encoder that encodes each text once: most of a training's time, where trainings share their rows."""

    def __init__(self, encoder):
        self.encoder = encoder
        self.states = {}

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def encode(self, texts, layers, max_tokens, progress=None):
        key = (tuple(layers), max_tokens)
        new = list(dict.fromkeys(text for text in texts if (text, key) not in self.states))
        found = self.encoder.encode(new, layers, max_tokens, progress)
        self.states |= {(text, key): state for text, state in zip(new, found, strict=True)}
        return torch.stack([self.states[text, key] for text in texts])


def trained(rows: list[Row], experts: list[str], encoder: Remembering):
    """A router that asks the encoder itself, so that its latency is real."""
    router = train_router(rows, experts, encoder, settings=default_settings(encoder))
    router.encoder = encoder.encoder
    return router


def left_out(encoder: Remembering, rows: list[Row]) -> dict:
    """Per source of a domain that has others: accuracy on its rows, and on those that do not open with a label."""
    found = {}
    labelled = {id(rows[i]) for i, _ in without_labels(rows)}
    for domain, sources in sources_of(rows).items():
        for source in sources if domain != OTHER else []:
            own = [row for row in rows if row.domain == domain and row.source == source]
            router = trained([row for row in rows if row.source != source], EXPERTS, encoder)
            bare = [row for row in own if id(row) not in labelled]
            found[source] = {
                "domain": domain,
                "rows": len(own),
                "accuracy": evaluate_router(router, own).accuracy,
                "bare": evaluate_router(router, bare).accuracy,
            }
    return found


def figures(router, rows: list[Row]) -> dict:
    """What `router eval` says, and the CPU time of a query, which other programs on the machine do not stretch."""
    data = evaluate_router(router, rows).to_dict()
    return {key: value for key, value in data.items() if key != "confusion"} | {"cpu_ms": cpu_ms(router, rows)}


def cpu_ms(router, rows: list[Row], count: int = 100) -> dict[str, float]:
    times = []
    for row in rows[:: max(1, len(rows) // count)][:count]:
        start = time.process_time()
        router.route(row.query)
        times.append((time.process_time() - start) * 1e3)
    return {"p50": statistics.median(times), "p95": statistics.quantiles(times, n=20)[-1]}


def fifth(encoder, rows: list[Row], held_out: list[Row]) -> dict:
    """One expert is learnt from 16 examples only: accuracy before and after, by which expert.

    added: by `add_experts`, without the other rows. after: by training again with them.
    """
    found = {}
    for name in EXPERTS:
        few = [row for row in rows if row.domain == name][:NEW]
        rest = [row for row in rows if row.domain != name]
        old = [expert for expert in EXPERTS if expert != name]
        router = trained(rest, old, encoder)
        before = evaluate_router(router, [r for r in held_out if r.domain != name])
        added = evaluate_router(add_experts(router, few), held_out)
        after = evaluate_router(trained([*rest, *few], EXPERTS, encoder), held_out)
        found[name] = {
            "before": before.accuracy,
            "others_after": statistics.mean(after.per_domain[expert] for expert in old),
            "new": after.per_domain[name],
            "others_added": statistics.mean(added.per_domain[expert] for expert in old),
            "new_added": added.per_domain[name],
        }
    return found


def many(encoder, counts: list[int]) -> list[dict]:
    """Made-up domains: each has 6 topic words of its own in requests of the same form."""
    draw = random.Random(0)
    syllables = [a + b for a in "bcdfglmnprstv" for b in ("a", "e", "i", "o", "u", "ar", "en", "il", "or", "us")]
    frames = ["how do I choose a {}", "tell me about {} and {}", "which {} is best for a {}", "compare {} with {}"]
    rows_of, found = {}, []
    for i in range(max(counts)):
        words = ["".join(draw.choices(syllables, k=3)) for _ in range(12)]
        rows_of[f"domain{i}"] = [
            Row(frame.format(*draw.sample(words, frame.count("{}"))), f"domain{i}")
            for frame in frames
            for _ in range(6)
        ]
    for count in counts:
        names = list(rows_of)[:count]
        train = [row for name in names for row in rows_of[name][::2]]
        test = [row for name in names for row in rows_of[name][1::2]]
        start = time.perf_counter()
        router = train_router(train, names, encoder, settings=default_settings(encoder))
        seconds = time.perf_counter() - start
        result = evaluate_router(router, test)
        heads = router.nbytes() - encoder.nbytes()
        found.append(
            {"experts": count, "accuracy": result.accuracy, "cpu_ms": cpu_ms(router, test)["p50"], "head_bytes": heads}
            | {"train_seconds": seconds}
        )
    return found


def measure(encoder, options: argparse.Namespace) -> dict:
    rows = read_rows(options.train, EXPERTS)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(7)).tolist()
    held_out, seen = [rows[i] for i in order[: len(rows) // 10]], [rows[i] for i in order[len(rows) // 10 :]]
    once = Remembering(encoder)
    entry = {"held_out": figures(trained(seen, EXPERTS, once), held_out)}
    if options.dev:
        router = trained(rows, EXPERTS, once)
        entry |= {"dev": figures(router, read_rows(options.dev, EXPERTS)), "threshold": router.threshold}
    if options.left_out:
        entry["left_out"] = left_out(once, rows)
    if options.fifth:
        entry["fifth"] = fifth(once, seen, [row for row in held_out if row.domain != OTHER])
    if options.many:
        entry["many"] = many(encoder, options.many)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="measure this causal LM as the family's base")
    parser.add_argument("--encoder", action="append", default=[], metavar="NAME=DIR[:8]", help="8: int8 linear layers")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path)
    parser.add_argument("--left-out", action="store_true")
    parser.add_argument("--fifth", action="store_true")
    parser.add_argument("--many", type=int, nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"encoders": {}}
    encoders = {"base": lambda: Encoder.load(options.base)} if options.base else {}
    for text in options.encoder:
        name, _, place = text.partition("=")
        directory, _, bits = place.partition(":")
        encoders[name] = lambda directory=directory, bits=bits: open_encoder(directory, bits=int(bits or 32))
    for name, load in encoders.items():
        entry = data["encoders"].get(name, {}) | measure(load(), options)
        entry["meta"] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "cpu": platform.processor()}
        data["encoders"][name] = entry
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")
        print(name, json.dumps(entry)[:400])


if __name__ == "__main__":
    main()

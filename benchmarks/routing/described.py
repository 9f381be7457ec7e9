"""Measure routing by descriptions and example lines: four domains without and with training, and public boards.

    python benchmarks/routing/described.py --encoder DIR[:8] --train train.jsonl \\
        --data dev=dev.jsonl --data choice=choice.jsonl --data final=final.jsonl \\
        --clinc data_full.json --banking DIR

`--data` files are rows of query, domain and source (`sources.py` makes two of them from public repositories).
The lines are those of `routes/`: three ideas of the four domains, and one line an intent of CLINC150 and
BANKING77. CLINC150 is `data_full.json` of clinc/oos-eval, BANKING77 the folder `banking_data` of
PolyAI-LDN/task-specific-datasets. Results go to results/routing-described.json; parts that are not asked for stay.
"""

import argparse
import csv
import functools
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import normalize

from meswitch.router import (
    OTHER,
    DescribedRouter,
    Row,
    Space,
    evaluate_router,
    open_encoder,
    read_options,
    read_rows,
    train_router,
)
from meswitch.router.described import suits_update
from meswitch.router.train import add_described

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.routing.run import Remembering, cpu_ms
from benchmarks.routing.sources import reread

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "routing-described.json"
PLAIN = HERE.parent / "results" / "routing-described-plain.json"
ROUTES = HERE / "routes"
EXPERTS = ["math", "code", "instruct", "sql"]
SEEDS = 3
EXAMPLES = (5, 10)


def lines() -> dict[str, list]:
    return {path.stem: read_options(path) for path in sorted(ROUTES.glob("four-*.toml"))}


def bare(options: list) -> list:
    return [replace(option, examples=()) for option in options]


def figures(router, rows: list[Row]) -> dict:
    data = evaluate_router(router, rows).to_dict()
    kept = ("accuracy", "per_domain", "per_source", "ece", "auroc", "coverage", "accepted_other")
    found = {name: data[name] for name in kept} | {"rows": len(rows), "threshold": router.threshold}
    again = [row for row in rows if reread(row.query) is None]
    if len(again) < len(rows):  # without the rows that are not what their source says
        without = evaluate_router(router, again)
        found["reread"] = {"accuracy": without.accuracy, "instruct": without.per_domain["instruct"]}
    return found


def naive(space: Space, options: list, rows: list[Row]) -> float:
    """Cosine of the last layer's mean with that of a route's description and lines: share right."""
    encode = lambda texts: normalize(space.encoder.encode(texts, [space.encoder.depth], 64), dim=1)  # noqa: E731
    points = torch.stack([encode([o.description, *o.examples]).mean(0) for o in options])
    known = [row for row in rows if row.domain != OTHER]
    best = (encode([row.query for row in known]) @ normalize(points, dim=1).T).argmax(1).tolist()
    return statistics.mean(options[i].name == row.domain for i, row in zip(best, known, strict=True))


def described(space: Space, plain: Space, data: dict[str, list[Row]]) -> dict:
    """Without training, by each set of lines, with them and by the descriptions alone.

    plain: of the encoder without its update, as the product has it for descriptions alone.
    """
    found = {}
    for name, options in lines().items():
        for kind, given in (("lines", options), ("description", bare(options))):
            router = DescribedRouter(given, space if suits_update(given) else plain)
            found[f"{name} {kind}"] = {
                key: figures(router, rows) | {"naive": naive(plain, given, rows)} for key, rows in data.items()
            }
            print(name, kind, {key: round(value["accuracy"], 3) for key, value in found[f"{name} {kind}"].items()})
        real = Space(space.encoder.encoder)  # not one that remembers
        found[f"{name} lines"]["cpu_ms"] = cpu_ms(DescribedRouter(options, real), next(iter(data.values())))
    return found


def seen_and_held_out(train: list[Row]) -> tuple[list[Row], list[Row]]:
    """Nine tenths of the training rows, and a tenth."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(7)).tolist()
    return [train[i] for i in order[len(train) // 10 :]], [train[i] for i in order[: len(train) // 10]]


def trained(encoder, train: list[Row], data: dict[str, list[Row]]) -> dict:
    """Trained on the rows, from nothing and from each set of lines; with held-out figures of a tenth."""
    seen, held_out = seen_and_held_out(train)
    found = {}
    for name, options in {"nothing": [], **lines()}.items():
        router = train_router(train, EXPERTS, encoder, options=options)
        found[name] = {key: figures(router, rows) for key, rows in data.items()}
        found[name]["held out"] = figures(train_router(seen, EXPERTS, encoder, options=options), held_out)
        print("trained from", name, {key: round(value["accuracy"], 3) for key, value in found[name].items()})
    return found


def fifth(encoder, train: list[Row], name: str) -> dict:
    """One expert comes by its lines to a router that was trained from the lines of the three others."""
    seen, held_out = seen_and_held_out(train)
    known = [row for row in held_out if row.domain != OTHER]
    options, found = read_options(ROUTES / f"{name}.toml"), {}
    for new in options:
        old = [option for option in options if option.name != new.name]
        names = [option.name for option in old]
        router = train_router([r for r in seen if r.domain != new.name], names, encoder, options=old)
        before = evaluate_router(router, [row for row in known if row.domain != new.name]).per_domain
        after = evaluate_router(add_described(router, [new]), known).per_domain
        others = [statistics.mean(shares[other] for other in names) for shares in (before, after)]
        found[new.name] = {"others_before": others[0], "others_after": others[1], "new": after[new.name]}
    print("fifth", name, found)
    return found


def board(space: Space, name: str, train: list[Row], test: list[Row], trained: dict | None) -> dict:
    """By one line an intent, with some examples of the training part, and trained on all of it.

    trained: figures of the last, if they are known.
    """
    options = read_options(ROUTES / f"{name}.toml")
    lines_of: dict[str, list[str]] = {option.name: [] for option in options}
    for row in train:
        if row.domain != OTHER:
            lines_of[row.domain].append(row.query)
    found = {"description": on_board(DescribedRouter(options, space), test)}
    for count in EXAMPLES:
        runs = []
        for seed in range(SEEDS):
            draw = random.Random(seed)
            some = [replace(o, examples=tuple(draw.sample(lines_of[o.name], count))) for o in options]
            runs.append(on_board(DescribedRouter(some, space), test))
        found[f"{count} examples"] = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    if trained is None:
        start = time.perf_counter()
        router = train_router(train, [option.name for option in options], space.encoder)
        trained = on_board(router, test) | {"train_seconds": time.perf_counter() - start}
    found["trained"] = trained
    print(name, {key: {k: round(v, 3) for k, v in value.items()} for key, value in found.items()})
    return found


def on_board(router, rows: list[Row]) -> dict[str, float]:
    """accuracy, macro_f1: in scope, never abstaining. oos_recall: where 95 % of what is in scope is kept."""
    result = evaluate_router(router, rows)
    confusion: dict[str, dict[str, int]] = {name: {} for name in router.experts}
    scored: list[dict[str, float]] = []
    for start in range(0, len(rows), 256):
        scored += router.scores([[{"role": "user", "content": row.query}] for row in rows[start : start + 256]])
    for row, scores in zip(rows, scored, strict=True):
        if row.domain != OTHER:
            best = max(router.experts, key=lambda name: scores[name])
            confusion[row.domain][best] = confusion[row.domain].get(best, 0) + 1
    f1 = []
    for name, row in confusion.items():
        true, said = row.get(name, 0), sum(other.get(name, 0) for other in confusion.values())
        f1.append(2 * true / max(1, said + sum(row.values())))
    found = {"accuracy": result.accuracy, "macro_f1": statistics.mean(f1), "ece": result.ece}
    if result.accepted_other is not None:
        found |= {"oos_recall": 1 - result.accepted_other, "auroc": result.auroc}
    return found


def clinc(file: Path) -> tuple[list[Row], list[Row]]:
    data = json.loads(file.read_text())
    rows = lambda *parts: [Row(text, OTHER if name == "oos" else name) for part in parts for text, name in data[part]]  # noqa: E731
    return rows("train", "oos_train"), rows("test", "oos_test")


def banking(folder: Path) -> tuple[list[Row], list[Row]]:
    read = lambda name: [Row(r["text"], r["category"]) for r in csv.DictReader((folder / name).open())]  # noqa: E731
    return read("train.csv"), read("test.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, metavar="DIR[:8]", help="8: int8 linear layers")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--time", type=Path, metavar="FILE", help="only time the routers by lines, on these queries")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--clinc", type=Path)
    parser.add_argument("--banking", type=Path)
    parser.add_argument("--plain", action="store_true", help="the encoder without its update; into PLAIN")
    parser.add_argument("--keep-trained", action="store_true", help="of boards keep the figures of trained routers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    directory, _, bits = options.encoder.partition(":")
    load = functools.partial(open_encoder, directory, bits=int(bits or 32))
    space, place = Space(Remembering(load(updated=not options.plain))), PLAIN if options.plain else RESULTS
    data = {name: read_rows(file, EXPERTS) for name, _, file in (text.partition("=") for text in options.data)}
    found = json.loads(place.read_text()) if place.exists() else {}
    if options.time:
        rows = read_rows(options.time, EXPERTS)
        for name, given in lines().items():
            router = DescribedRouter(given, Space(space.encoder.encoder))
            found["described"][f"{name} lines"]["cpu_ms"] = cpu_ms(router, rows)
        place.write_text(json.dumps(found, indent=1) + "\n")
        return
    parts = {}
    if data:
        parts["described"] = lambda: described(space, Space(Remembering(load(updated=False))), data)
    if data and options.train:
        parts["trained"] = lambda: trained(space.encoder, read_rows(options.train, EXPERTS), data)
    if options.train:
        rows = read_rows(options.train, EXPERTS)
        parts["fifth"] = lambda: {name: fifth(space.encoder, rows, name) for name in ("four-1", "four-2")}
    kept = lambda name: found[name]["trained"] if options.keep_trained else None  # noqa: E731
    if options.clinc:
        parts["clinc150"] = lambda: board(space, "clinc150", *clinc(options.clinc), kept("clinc150"))
    if options.banking:
        parts["banking77"] = lambda: board(space, "banking77", *banking(options.banking), kept("banking77"))
    found["meta"] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "bits": int(bits or 32)}
    for name, measure in parts.items():
        found[name] = measure()
        place.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

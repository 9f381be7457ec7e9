"""Do a few examples a route suffice on boards of intents that no table of results is about?

    python benchmarks/routing/boards.py --encoder DIR[:8] --clones DIR --version now

The constants of routing without training were chosen on these boards: the validation part of CLINC150, HWU64, ATIS,
SNIPS, HINT3's three and titles of Stack Overflow. CLONES holds a clone (bare or not) of each repository that `BOARDS`
names, as OWNER+NAME. Each board is measured with all of its intents and with 8 of them, where the queries for the
rest are nobody's. `--version` names the entry of results/routing-boards.json; other entries stay.
"""

import argparse
import csv
import io
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from meswitch.router import OTHER, DescribedRouter, RouteOption, Row, Space, evaluate_router, open_encoder

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.routing.run import Remembering
from benchmarks.routing.sources import read_bytes

RESULTS = Path(__file__).parent.parent / "results" / "routing-boards.json"
EXAMPLES = (3, 5, 10)
FEW = 8  # intents
SEEDS = 2
LEAST = 11  # different queries of an intent: ten are examples
MOST = 1000  # queries that are asked
Read = Callable[[str], str]  # a path in the board's repository -> its text
Rows = list[Row]

_TITLES = (
    *("wordpress", "oracle", "svn", "apache", "excel", "matlab", "visual-studio", "cocoa", "osx", "bash", "spark"),
    *("hibernate", "scala", "sharepoint", "ajax", "qt", "drupal", "linq", "haskell", "magento"),
)


def clinc(read: Read) -> tuple[Rows, Rows]:
    data = json.loads(read("data/data_full.json"))
    other = [Row(text, OTHER) for text, _ in data["oos_val"]]
    return [Row(*row) for row in data["train"]], [Row(*row) for row in data["val"]] + other


def few_shot(name: str) -> Callable[[Read], tuple[Rows, Rows]]:
    def part(read: Read, which: str) -> Rows:
        texts, labels = (read(f"Datasets/{name}/{which}/{file}").splitlines() for file in ("seq.in", "label"))
        return [Row(text.strip(), label.strip()) for text, label in zip(texts, labels, strict=True)]

    return lambda read: (part(read, "train"), part(read, "test"))


def hint3(name: str) -> Callable[[Read], tuple[Rows, Rows]]:
    def part(read: Read, which: str) -> Rows:
        rows = csv.DictReader(io.StringIO(read(f"dataset/v2/{which}/{name}_{which}.csv")))
        return [Row(r["sentence"], OTHER if r["label"] == "NO_NODES_DETECTED" else r["label"]) for r in rows]

    return lambda read: (part(read, "train"), part(read, "test"))


def titles(read: Read) -> tuple[Rows, Rows]:
    texts, labels = (read(f"rawText/{name}_StackOverflow.txt").splitlines() for name in ("title", "label"))
    rows = [Row(text.strip(), _TITLES[int(label) - 1]) for text, label in zip(texts, labels, strict=True)]
    random.Random(0).shuffle(rows)
    return rows[2000:4000], rows[:2000]


_FEW_SHOT, _HINT = "jianguoz/Few-Shot-Intent-Detection", "hellohaptik/HINT3"
BOARDS = {
    "CLINC150, validation": ("clinc/oos-eval", clinc),
    "HWU64": (_FEW_SHOT, few_shot("HWU64")),
    "ATIS": (_FEW_SHOT, few_shot("ATIS")),
    "SNIPS": (_FEW_SHOT, few_shot("SNIPS")),
    "HINT3 curekart": (_HINT, hint3("curekart")),
    "HINT3 powerplay11": (_HINT, hint3("powerplay11")),
    "HINT3 sofmattress": (_HINT, hint3("sofmattress")),
    "Stack Overflow titles": ("jacoxu/StackOverflow", titles),
}


def measured(space: Space, train: Rows, test: Rows, names: Sequence[str], count: int, seed: int) -> dict[str, float]:
    """Routes `names`, each by its name and `count` examples; what is not theirs is nobody's."""
    draw = random.Random(seed)
    lines = {name: list(dict.fromkeys(row.query for row in train if row.domain == name)) for name in names}
    options = [RouteOption(name, _words(name), tuple(draw.sample(lines[name], count))) for name in names]
    rows = [Row(row.query, row.domain if row.domain in lines else OTHER) for row in test]
    found = evaluate_router(DescribedRouter(options, space), draw.sample(rows, min(MOST, len(rows))))
    figures = {"accuracy": found.accuracy, "ece": found.ece}
    return figures if found.auroc is None else figures | {"auroc": found.auroc}


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").lower()


def board(space: Space, train: Rows, test: Rows) -> dict[str, dict]:
    counts = Counter(row.domain for row in dict.fromkeys(train) if row.domain != OTHER)
    names = sorted(name for name, count in counts.items() if count >= LEAST)
    test = [row for row in test if row.domain in names or row.domain == OTHER]
    found: dict[str, dict] = {}
    for some in dict.fromkeys((len(names), min(FEW, len(names)))):
        for count in EXAMPLES:
            runs = []
            for seed in range(SEEDS):
                own = names if some == len(names) else random.Random(seed).sample(names, some)
                runs.append(measured(space, train, test, own, count, seed))
            found[f"{some} routes, {count} examples"] = {
                key: statistics.mean(run[key] for run in runs) for key in runs[0]
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, metavar="DIR[:8]", help="8: int8 linear layers")
    parser.add_argument("--clones", type=Path, required=True)
    parser.add_argument("--version", default="now", help="of meswitch, as the table calls it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    directory, _, bits = options.encoder.partition(":")
    space = Space(Remembering(open_encoder(directory, bits=int(bits or 32))))
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    entry: dict[str, dict] = {"meta": {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "bits": bits}}
    for name, (repository, read) in BOARDS.items():
        text = lambda path, repository=repository: read_bytes(options.clones, repository, path).decode()  # noqa: E731
        entry[name] = board(space, *read(text))
        print(name, {key: round(value["accuracy"], 3) for key, value in entry[name].items()}, flush=True)
    RESULTS.write_text(json.dumps(found | {options.version: entry}, indent=1) + "\n")


if __name__ == "__main__":
    main()

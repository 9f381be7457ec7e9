"""What tells a question to a database from any other: the text, a schema in it or a turn before, a rule.

    python benchmarks/routing/context.py --encoder DIR[:8] --train train.jsonl --data dev.jsonl --data choice.jsonl

`--data` are the files of `described.py`. Of sql only questions without a label count ("Write a SQL query: "). Beside
them go 100 rows of each other expert, each after the same turn about a database: they show what it costs when somebody
changes the subject. Routers by lines and trained from lines, the mean over the three sets of lines. Results go to
results/routing-context.json.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from meswitch.router import (
    DescribedRouter,
    Router,
    Row,
    Rule,
    RulesRouter,
    Space,
    open_encoder,
    read_rows,
    train_router,
)
from meswitch.router.rules import RoutingRequest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.routing.described import EXPERTS, lines
from benchmarks.routing.run import Remembering

RESULTS = Path(__file__).parent.parent / "results" / "routing-context.json"
MOST = 100  # rows of a source of sql, and of another expert
SCHEMAS = {
    "t2s_imdb": "movie(title, release_year, budget), actor(name, nationality), director(name), cast(movie, actor)",
    "t2s_academic": "author(name), publication(title, year, citations), conference(name), keyword(name)",
    "t2s_scholar": "paper(title, year), author(name), venue(name), keyphrase(name), cites(citing, cited)",
}
SYSTEM = "You answer questions about the company's database."
RULES = [Rule("sql", "system", r"(?i)\b(database|sql)\b"), Rule("sql", "metadata:app", "^reports$")]


def said(row: Row) -> str:
    """What somebody says of the database before, or in front of, a question."""
    return f"I have a database with these tables: {SCHEMAS.get(row.source, SCHEMAS['t2s_imdb'])}."


def user(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


WAYS: dict[str, Callable[[Row], RoutingRequest]] = {
    "the question alone": lambda row: RoutingRequest(user(row.query)),
    "the schema before it, in the same message": lambda row: RoutingRequest(user(f"{said(row)}\n{row.query}")),
    "the schema a turn before": lambda row: RoutingRequest(user(said(row), row.query)),
    "a system prompt that names a database, and a rule": lambda row: RoutingRequest(
        [{"role": "system", "content": SYSTEM}, *user(row.query)]
    ),
    "metadata that names the application, and a rule": lambda row: RoutingRequest(
        user(row.query), metadata={"app": "reports"}
    ),
}


def shares(router: Router, rows: list[Row]) -> dict[str, dict[str, float]]:
    """For each way the share of rows of sql, and of others, that reach their expert."""
    ruled = RulesRouter(RULES, router.experts, router)
    found = {}
    for name, ask in WAYS.items():
        right: dict[bool, list[bool]] = {True: [], False: []}
        for row in rows:
            right[row.domain == "sql"].append(ruled.route(ask(row)).choice == row.domain)
        found[name] = {"sql": statistics.mean(right[True]), "others": statistics.mean(right[False])}
    return found


def chosen(rows: list[Row]) -> list[Row]:
    draw = random.Random(0)
    groups = [[r for r in rows if r.source == source and not r.query.startswith("Write a SQL")] for source in SCHEMAS]
    groups += [[r for r in rows if r.domain == name] for name in EXPERTS if name != "sql"]
    return [row for group in groups for row in draw.sample(group, min(MOST, len(group)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, metavar="DIR[:8]", help="8: int8 linear layers")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--data", type=Path, action="append", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    directory, _, bits = options.encoder.partition(":")
    space = Space(Remembering(open_encoder(directory, bits=int(bits or 32))))
    rows = chosen([row for file in options.data for row in read_rows(file, EXPERTS)])
    train = read_rows(options.train, EXPERTS)
    runs: dict[str, list[dict[str, dict[str, float]]]] = {"lines": [], "trained": []}
    for given in lines().values():
        runs["lines"].append(shares(DescribedRouter(given, space, threshold=0.0), rows))
        trained = train_router(train, EXPERTS, space.encoder, options=given)
        trained.threshold = 0.0
        runs["trained"].append(shares(trained, rows))
        print({kind: some[-1] for kind, some in runs.items()}, flush=True)
    counts = {"sql": sum(row.domain == "sql" for row in rows), "others": sum(row.domain != "sql" for row in rows)}
    found = {
        "meta": {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "rows": counts},
        **{
            kind: {
                way: {key: statistics.mean(run[way][key] for run in some) for key in ("sql", "others")} for way in WAYS
            }
            for kind, some in runs.items()
        },
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

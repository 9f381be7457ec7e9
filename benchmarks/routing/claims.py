"""Routers without anybody's labels: what experts claim, of given queries and of queries that they write.

    python benchmarks/routing/claims.py --encoder DIR[:8] [--deltas runs/demo]

On the toy family, whose experts learnt from answers alone. A quarter of its queries is the log that nobody labelled,
another quarter is the test. Results go to results/routing-claims.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from meswitch import Engine
from meswitch.family import Family
from meswitch.router import (
    OTHER,
    DescribedRouter,
    Encoder,
    RouteOption,
    Space,
    evaluate_router,
    open_encoder,
    read_rows,
    train_router,
)
from meswitch.router.data import claim_queries, write_queries

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.routing.described import EXPERTS
from benchmarks.routing.run import Remembering

FAMILY = Path(__file__).parents[2] / "examples" / "family"
RESULTS = Path(__file__).parent.parent / "results" / "routing-claims.json"
WRITTEN = 100  # queries of each expert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, metavar="DIR[:8]", help="8: int8 linear layers")
    parser.add_argument("--deltas", type=Path, default=Path("runs/demo"), help="the experts' artifacts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows(FAMILY / "routing.jsonl", EXPERTS)
    log, test = rows[::4], rows[1::4]
    with Engine(FAMILY / "base", {name: options.deltas / name for name in EXPERTS}) as engine:
        claimed = {
            "what they claim of 400 queries": claim_queries(engine, [row.query for row in log], EXPERTS),
            "what they claim of queries that they wrote": claim_queries(
                engine, write_queries(engine, EXPERTS, WRITTEN), EXPERTS
            ),
        }
    directory, _, bits = options.encoder.partition(":")
    encoders = {
        "base": Remembering(Encoder.load(FAMILY / "base")),
        "minilm-l6-int8": Remembering(open_encoder(directory, bits=int(bits or 32))),
    }
    said = Family.load(FAMILY).expert
    bare = [RouteOption(expert.name, expert.description) for expert in said]
    lined = [RouteOption(expert.name, expert.description, expert.examples) for expert in said]
    found: dict[str, dict] = {}
    for name, encoder in encoders.items():
        routers = {"descriptions": DescribedRouter(bare, Space(encoder))}
        routers |= {kind: train_router(mine, EXPERTS, encoder) for kind, mine in claimed.items()}
        routers["five lines each"] = DescribedRouter(lined, Space(encoder))
        routers["the same 400 queries, labelled"] = train_router(log, EXPERTS, encoder)
        for kind, router in routers.items():
            data = evaluate_router(router, test).to_dict()
            found.setdefault(kind, {})[name] = {key: data[key] for key in ("accuracy", "per_domain", "auroc")}
            print(kind, name, round(data["accuracy"], 3), flush=True)
    domains = {row.query: row.domain for row in log}
    mine = [row for row in claimed["what they claim of 400 queries"] if domains[row.query] != OTHER]
    right = sum(domains[row.query] == row.domain for row in mine) / len(mine)
    meta = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "test": len(test)}
    meta |= {"right": right, "rows": {kind: len(some) for kind, some in claimed.items()}}
    RESULTS.write_text(json.dumps({"meta": meta, "routers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Answer a file of queries offline: a router chooses the expert of each, and all are answered in one batch.

    python examples/batch_with_routing.py FAMILY.toml QUERIES.jsonl ANSWERS.jsonl

The family's experts are compressed and its router is trained (`meswitch compress`, `meswitch router train`). A row of
QUERIES has a `query`; a row of ANSWERS has it with `expert`, `score` and `answer`.
"""

import json
import sys
from pathlib import Path

from meswitch.family import Family
from meswitch.launch import engine_from_family, router_from_family


def main(file: str, queries: str, answers: str) -> None:
    family = Family.load(file)
    rows = [json.loads(line)["query"] for line in Path(queries).read_text().splitlines()]
    with engine_from_family(family) as engine:
        router = router_from_family(family, engine)
        routes = [router.route(query) for query in rows]
        prompts = [[{"role": "user", "content": query}] for query in rows]
        done = engine.generate(prompts, model=[route.choice for route in routes], max_new_tokens=56)
    with Path(answers).open("w") as out:
        for query, route, answer in zip(rows, routes, done, strict=True):
            found = {"query": query, "expert": route.choice, "score": max(route.scores.values()), "answer": answer.text}
            print(json.dumps(found), file=out)


if __name__ == "__main__":
    main(*sys.argv[1:4])

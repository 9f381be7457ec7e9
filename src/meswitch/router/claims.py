"""Rows without anybody's labels: experts write queries, and claim those, or given ones, by how sure their answers are.

Every expert and the base answer each query. An expert that is much surer of its answer than it is of others, and more
so than any other expert, claims the query. Where the base is the one, nobody claims it: it is as good as any. Of the
claims of each expert the clearest third become rows to train on; the rest are wrong too often.

Without queries the experts write some: a chat model that is shown only the opening of a user's turn goes on with a
question (Magpie, arXiv 2406.08464). One that learnt from answers alone, whose questions were masked, writes answers;
give queries then. Any text that users wrote will do, from a log say.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.jsonfile import read_json_lines
from meswitch.router.base import RouterError
from meswitch.router.data import Row, plain
from meswitch.router.encoder import Progress

SOURCE = "claimed"  # of the rows
KEPT = 1 / 3  # of an expert's claims; on the toy family 0.5 and 1 made worse routers
LEAST = 5  # rows of an expert, if it claims so many
_ANSWER = 32  # tokens of an answer that are judged
_QUESTION = 96  # tokens of a query that an expert writes
_LONGEST = 2000  # characters of a query that are asked
_AT_ONCE = 32  # requests
_MARK = "QUERY-GOES-HERE"


class Answers(Protocol):
    """What answers: `meswitch.Engine` is one."""

    base_name: str

    @property
    def tokenizers(self) -> Mapping[str, Any]: ...

    def generate(self, prompts: Sequence[Any], *, model: str | None = None, **params: Any) -> list[Any]: ...


def read_queries(path: str | Path) -> list[str]:
    """Queries of a file, each once: JSON lines with a `query`; other fields, labels too, are ignored.

    Raises:
        RouterError: no such file, no rows, or a line without a query.
    """
    found: dict[str, str] = {}
    for number, value in read_json_lines(Path(path), RouterError):
        query = value.get("query") if isinstance(value, dict) else None
        if not isinstance(query, str) or not query.strip():
            raise RouterError(f'{path}: line {number}: query: missing or empty; a row is {{"query": "..."}}')
        found.setdefault(plain(query), query)
    if not found:
        raise RouterError(f'{path}: has no rows; give JSON lines of {{"query": "..."}}')
    return list(found.values())


def write_queries(engine: Answers, experts: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """What the experts write where a user's turn stands in their chat templates, each text once.

    Args:
        engine: serves the experts.
        count: queries of each expert.
        seed: decides which; the same seed gives the same queries.

    Raises:
        ConfigError: an expert without a chat template, or none wrote anything of use.
    """
    found: dict[str, str] = {}
    for name in experts:
        tokenizer = engine.tokenizers[name]
        if not tokenizer.has_template:
            raise ConfigError(f"{name}: has no chat template, so it cannot write queries; give some with --data")
        before, _, after = tokenizer.render([{"role": "user", "content": _MARK}]).partition(_MARK)
        opening = list(tokenizer.tokenizer(before.rstrip(" "), add_special_tokens=False).input_ids)
        end = after.strip().split("\n")[0]
        params = {"max_new_tokens": _QUESTION, "temperature": 1.0, "stop": end or ()}

        def write(number: int, name: str = name, opening: list[int] = opening, params: Any = params) -> str:
            return str(engine.generate([opening], model=name, seed=seed + number, **params)[0].text).strip()

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for text in pool.map(write, range(count)):
                if len(text.split()) > 2:
                    found.setdefault(plain(text), text)
    if not found:
        raise ConfigError("the experts wrote no queries; give some with --data")
    return list(found.values())


def claim_queries(
    engine: Answers, queries: Sequence[str], experts: Sequence[str], progress: Progress | None = None
) -> list[Row]:
    """The queries that an expert clearly claims, as rows of it.

    Args:
        engine: serves the experts and the base.
        queries: different ones, a few hundred or more.
        progress: is told how many answers of how many there are.

    Raises:
        RouterError: an expert that claims fewer than 5.
    """
    models = [*experts, engine.base_name]
    sureness = torch.zeros(len(models), len(queries), dtype=torch.float64)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for place, model in enumerate(models):  # one after the other, so that each is loaded once
            found = pool.map(lambda query, model=model: _sureness(engine, model, query), queries)
            for i, sure in enumerate(found):
                sureness[place, i] = sure
                if progress is not None:
                    progress(place * len(queries) + i + 1, sureness.numel())
    return rows_of(queries, experts, sureness.T)


def rows_of(queries: Sequence[str], experts: Sequence[str], sureness: Tensor) -> list[Row]:
    """Rows of the clearest claims.

    Args:
        sureness: [queries, experts + 1], the mean log-probability of each answer's tokens, the base's last; NaN where
            a model cannot take the query.

    Raises:
        RouterError: an expert that claims fewer than 5.
    """
    asked = ~sureness.isnan().any(1)
    values = sureness[asked]
    usual = values.mean(0) if len(values) else 0.0
    spread = values.std(0, correction=0).clamp_min(1e-6) if len(values) else 1.0
    scores = (sureness - usual) / spread
    best = scores[:, :-1].sort(1, descending=True)
    clear = best.values[:, 0] - best.values[:, 1] if len(experts) > 1 else best.values[:, 0]
    mine = asked & (best.values[:, 0] > scores[:, -1])
    rows: list[Row] = []
    for number, name in enumerate(experts):
        claims = (mine & (best.indices[:, 0] == number)).nonzero()[:, 0]
        if len(claims) < LEAST:
            raise RouterError(
                f"{name!r} claims {len(claims)} of {len(queries)} queries, fewer than {LEAST}; give more queries with "
                "--data, or labelled rows"
            )
        kept = claims[clear[claims].argsort(descending=True)][: max(LEAST, round(KEPT * len(claims)))]
        rows += [Row(queries[i], name, SOURCE) for i in kept.sort().values.tolist()]
    return rows


def _sureness(engine: Answers, model: str, query: str) -> float:
    """Mean log-probability of the tokens of the greedy answer; NaN for a query that is too long."""
    text = query[:_LONGEST]
    prompt = [{"role": "user", "content": text}] if engine.tokenizers[model].has_template else text
    try:
        (answer,) = engine.generate([prompt], model=model, max_new_tokens=_ANSWER, logprobs=0)
    except ConfigError:  # longer than the model reads
        return math.nan
    return sum(token.logprob for token in answer.logprobs) / max(1, len(answer.logprobs))

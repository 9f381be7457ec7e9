"""Routing data: JSON lines of `{"query": ..., "domain": ..., "source": ...}`, and what is done to rows before training.

Rows are kept apart for calibration and figures (the same share of every domain and source, equal queries together),
looked for in other data (equal, equal but for form, nearly so), and copied without what gives their domain away for
the wrong reason. Data sets have habits that traffic does not share: one writes "Write a SQL query: " before its
questions, another is all in lower case. A head that learns the habit is right on that data set and lost elsewhere.
Measured by leaving sources out; the copies are used for training only, never for calibration or figures.

Rows without anybody's labels: experts write queries, and claim those, or given ones, by how sure their answers are.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.jsonfile import json_kind, read_json_lines
from meswitch.router.base import OTHER, RouterError

SHINGLE = 3  # words
NEAR = 0.7  # Jaccard similarity of two queries' shingles from which they count as near duplicates
_COMMON = 200  # a shingle in more rows than this proposes no candidates: it is a form, not a query
_LABEL = re.compile(r"([^:\n]{3,40}):\s+(?=\S)")  # "Write a SQL query: ...", "Question: ..."
_ASKING = re.compile(
    r"(?:are|can|could|did|do|does|has|have|how|is|may|should|was|were|wh\w+|will|would)\b"  # wh: what, when, who ...
)
_SHARE = 0.05  # of a domain's rows that open alike: a habit
_CLAIMED = "claimed"  # source of the rows that experts claim
_CLAIMS_KEPT = 1 / 3  # of an expert's claims; on the toy family 0.5 and 1 made worse routers
_LEAST_CLAIMS = 5  # rows of an expert, if it claims so many
_ANSWER = 32  # tokens of an answer that are judged
_QUESTION = 96  # tokens of a query that an expert writes
_LONGEST = 2000  # characters of a query that are asked
_AT_ONCE = 32  # requests
_MARK = "QUERY-GOES-HERE"  # in a rendered chat, to see what stands before and after


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled query.

    Args:
        domain: an expert's name, or `other`.
        source: where it comes from, for the figures.
    """

    query: str
    domain: str
    source: str = "unknown"


def read_rows(path: str | Path, experts: Collection[str]) -> list[Row]:
    """Read and check a data file; fields beyond the three are ignored, `source` may be left out.

    Raises:
        RouterError: no such file, no rows, or a line that is not such a row; names the file, line and field.
    """
    file = Path(path)
    found = read_json_lines(file, RouterError)
    rows = [_row(value, f"{file}: line {number}", experts) for number, value in found]
    if not rows:
        raise RouterError(f"{file}: has no rows; give JSON lines with query, domain and source")
    return rows


def _row(data: Any, where: str, experts: Collection[str]) -> Row:
    if not isinstance(data, dict):
        raise RouterError(f"{where}: expected an object with query, domain and source, found {json_kind(data)}")
    fields = {"source": "unknown"} | {name: data[name] for name in ("query", "domain", "source") if name in data}
    for name in ("query", "domain", "source"):
        if name not in fields:
            raise RouterError(f'{where}: {name}: missing; a row is {{"query": ..., "domain": ..., "source": ...}}')
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise RouterError(f"{where}: {name}: expected a text that is not empty, found {fields[name]!r:.40}")
    if fields["domain"] != OTHER and fields["domain"] not in experts:
        known = ", ".join(experts) or "none"
        raise RouterError(
            f"{where}: domain: {fields['domain']!r} is no expert of the family ({known}); "
            f"correct it, or use {OTHER!r} for queries that no expert is for"
        )
    return Row(**fields)


# Rows kept apart for calibration and figures: the same share of every domain and source, equal queries together.


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows held out); the same seed gives the same split.

    Queries that are equal but for case, spaces, digits' places and punctuation are on the same side. A source with
    few different queries stays whole on the training side.

    Raises:
        RouterError: nothing is left on one side.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(normal(row.query), []).append(row)
    strata: dict[tuple[str, str], list[list[Row]]] = {}
    for group in groups.values():
        strata.setdefault((group[0].domain, group[0].source), []).append(group)
    generator = torch.Generator().manual_seed(seed)
    seen: list[Row] = []
    held_out: list[Row] = []
    for key in sorted(strata):
        members = strata[key]
        count = round(len(members) * share)
        for place, which in enumerate(torch.randperm(len(members), generator=generator).tolist()):
            (held_out if place < count else seen).extend(members[which])
    if not seen or not held_out:
        raise RouterError(f"data: {len(rows)} rows leave none to train on or none to calibrate on; give more")
    return seen, held_out


def plain(query: str) -> str:
    """A query but for case and spaces."""
    return " ".join(query.lower().split())


def folds(rows: Sequence[Row], count: int, seed: int) -> Tensor:
    """[n] int64: each row's fold. Every domain is spread evenly, and equal queries stay together."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(plain(row.query), []).append(i)
    by_domain: dict[str, list[list[int]]] = {}
    for group in groups.values():
        by_domain.setdefault(rows[group[0]].domain, []).append(group)
    generator = torch.Generator().manual_seed(seed)
    fold = torch.zeros(len(rows), dtype=torch.int64)
    for domain in sorted(by_domain):
        members = by_domain[domain]
        for place, which in enumerate(torch.randperm(len(members), generator=generator).tolist()):
            fold[members[which]] = place % count
    return fold


# Queries that are in two data sets, or twice in one: equal, equal but for form, or nearly so.
#
# Near duplicates are found by their shingles: queries that share most runs of `SHINGLE` words differ in a name or a
# number, and a router that has seen one has seen the other. Candidates come from an index of the rarer shingles, so
# the comparison is near linear in the number of rows.


@dataclass(frozen=True, slots=True)
class Leakage:
    """Rows of the second data set that the first one has too.

    Args:
        exact: indices into the second data set; each row is counted once, in the first kind that fits.
        normalised: likewise, of rows that are equal but for case, spaces and punctuation.
        near: likewise, of rows that are nearly equal.
        conflicts: how many of them have another domain there.
    """

    exact: tuple[int, ...]
    normalised: tuple[int, ...]
    near: tuple[int, ...]
    conflicts: int

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(sorted((*self.exact, *self.normalised, *self.near)))

    def counts(self) -> dict[str, int]:
        return {
            "exact": len(self.exact),
            "normalised": len(self.normalised),
            "near": len(self.near),
            "conflicts": self.conflicts,
        }


def find_leakage(train: Sequence[Row], held_out: Sequence[Row], near: float = NEAR) -> Leakage:
    """Which rows of `held_out` are in `train`?"""
    index = _Index(train)
    found: dict[str, list[int]] = {"exact": [], "normalised": [], "near": []}
    conflicts = 0
    for i, row in enumerate(held_out):
        match = index.match(row.query, near)
        if match is not None:
            kind, other = match
            found[kind].append(i)
            conflicts += train[other].domain != row.domain
    return Leakage(tuple(found["exact"]), tuple(found["normalised"]), tuple(found["near"]), conflicts)


def drop_duplicates(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Rows whose normalised query comes for the first time, and how many were left out."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(normal(row.query), row)
    return list(first.values()), len(rows) - len(first)


def normal(query: str) -> str:
    """A query without what does not change it: case, spaces, punctuation at the words' edges, Unicode's variants."""
    text = unicodedata.normalize("NFKC", query).casefold()
    words = (word.strip(".,;:!?\"'()[]{}`*_") for word in text.split())
    return " ".join(word for word in words if word) or text.strip()


def shingles(query: str) -> frozenset[str]:
    """Runs of `SHINGLE` words; a shorter query is one shingle."""
    words = re.findall(r"\w+", normal(query))
    if len(words) <= SHINGLE:
        return frozenset([" ".join(words)])
    return frozenset(" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1))


class _Index:
    """Looks queries up among rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._exact = {row.query: i for i, row in reversed(list(enumerate(rows)))}
        self._normal = {normal(row.query): i for i, row in reversed(list(enumerate(rows)))}
        self._sets = [shingles(row.query) for row in rows]
        self._rows_of: defaultdict[str, list[int]] = defaultdict(list)
        for i, held in enumerate(self._sets):
            for shingle in held:
                self._rows_of[shingle].append(i)

    def match(self, query: str, near: float) -> tuple[str, int] | None:
        """(kind, row) of the closest row that counts as the same."""
        if query in self._exact:
            return "exact", self._exact[query]
        key = normal(query)
        if key in self._normal:
            return "normalised", self._normal[key]
        mine = shingles(query)
        shared: Counter[int] = Counter()
        for shingle in mine:
            rows = self._rows_of.get(shingle, ())
            if len(rows) <= _COMMON:
                shared.update(rows)
        best, best_row = 0.0, -1
        for row in sorted(shared):
            theirs = self._sets[row]
            common = len(mine & theirs)
            similarity = common / (len(mine) + len(theirs) - common)
            if similarity > best:
                best, best_row = similarity, row
        return ("near", best_row) if best >= near else None


# Copies of training rows without what gives their domain away for the wrong reason.
#
# Data sets have habits that traffic does not share: one writes "Write a SQL query: " before its questions, another
# is all in lower case. A head that learns the habit is right on that data set and lost elsewhere. Measured by
# leaving sources out; the copies are used for training only, never for calibration or figures.


def without_labels(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """(index of the row, the row without its opening label) where many rows of the domain open with that label."""
    found = [_LABEL.match(row.query) for row in rows]
    sizes = Counter(row.domain for row in rows)
    labels = Counter((row.domain, match[1]) for row, match in zip(rows, found, strict=True) if match)
    return [
        (i, replace(row, query=row.query[match.end() :]))
        for i, (row, match) in enumerate(zip(rows, found, strict=True))
        if match and labels[row.domain, match[1]] >= max(5, _SHARE * sizes[row.domain])
    ]


def in_lower_case(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """(index of the row, the row in lower case without its final mark), of those that are not written so."""
    plain = [replace(row, query=row.query.lower().rstrip().rstrip("?.!")) for row in rows]
    return [(i, copy) for i, (row, copy) in enumerate(zip(rows, plain, strict=True)) if copy != row and copy.query]


def as_sentences(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """(index of the row, the row with a capital and a final mark), of those that have neither."""
    found = []
    for i, row in enumerate(rows):
        text = row.query.strip()
        if text and text == text.lower() and text[-1].isalnum():
            mark = "?" if _ASKING.match(text) else "."
            found.append((i, replace(row, query=re.sub(r"\bi\b", "I", text[0].upper() + text[1:]) + mark)))
    return found


def disguises(rows: Sequence[Row]) -> list[list[Row]]:
    """For each row its copies without habits: without a label, and both in the other way of writing."""
    bare = without_labels(rows)
    both = [*enumerate(rows), *bare]
    copies: list[list[Row]] = [[] for _ in rows]
    for i, row in bare:
        copies[i].append(row)
    for vary in (in_lower_case, as_sentences):
        for place, row in vary([row for _, row in both]):
            copies[both[place][0]].append(row)
    return copies


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

    A chat model that is shown only the opening of a user's turn goes on with a question (Magpie, arXiv 2406.08464). One
    that learnt from answers alone, whose questions were masked, writes answers: give `claim_queries` other queries
    then. Any text that users wrote will do, from a log say.

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
    engine: Answers, queries: Sequence[str], experts: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> list[Row]:
    """The queries that an expert clearly claims, as rows of it.

    Every expert and the base answer each query. An expert that is much surer of its answer than it is of others, and
    more so than any other expert, claims the query. Where the base is the one, nobody claims it: it is as good as any.
    Of the claims of each expert the clearest third become rows to train on; the rest are wrong too often.

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
    return claimed_rows(queries, experts, sureness.T)


def claimed_rows(queries: Sequence[str], experts: Sequence[str], sureness: Tensor) -> list[Row]:
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
        if len(claims) < _LEAST_CLAIMS:
            raise RouterError(
                f"{name!r} claims {len(claims)} of {len(queries)} queries, fewer than {_LEAST_CLAIMS}; give more "
                "queries with --data, or labelled rows"
            )
        kept = claims[clear[claims].argsort(descending=True)][: max(_LEAST_CLAIMS, round(_CLAIMS_KEPT * len(claims)))]
        rows += [Row(queries[i], name, _CLAIMED) for i in kept.sort().values.tolist()]
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

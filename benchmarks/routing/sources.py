"""Queries of public data sets in one form, to measure routing on: `{"query", "domain", "source"}` a line.

    python benchmarks/routing/sources.py --clones DIR --out unseen.jsonl --split choice

DIR holds a clone (bare or not) of each repository that `SOURCES` names, as OWNER+NAME. The sets are benchmarks of
their fields: measure on them, never train on them. Settings of the product were compared on `choice`. `final` and
`last` were looked at when all was decided, by earlier versions too. At most 200 rows of a source, drawn with
a fixed seed; the queries stay outside this repository (licences differ).
"""

import argparse
import functools
import gzip
import hashlib
import json
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MOST = 200  # rows of a source
_SEED = 0


@dataclass(frozen=True)
class Source:
    """repository: OWNER/NAME. path: in it. read: its bytes -> queries. split: choice, final or last."""

    name: str
    domain: str
    repository: str
    path: str
    read: Callable[[bytes], Iterator[str]]
    split: str


def lines(*fields: str) -> Callable[[bytes], Iterator[str]]:
    """JSON lines (also gzipped); the query is the fields joined by a newline."""

    def read(raw: bytes) -> Iterator[str]:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
        for line in text.splitlines():
            if line.strip():
                row = json.loads(line)
                yield "\n".join(_text(row[field]) for field in fields if row.get(field))

    return read


def _text(value) -> str:
    return "\n".join(value) if isinstance(value, list) else str(value)


def text2sql(raw: bytes) -> Iterator[str]:
    """Questions of text2sql-data with their variables filled in."""
    import bz2

    if raw[:3] == b"BZh":
        raw = bz2.decompress(raw)
    for entry in json.loads(raw):
        for sentence in entry["sentences"]:
            text = sentence["text"]
            for name, value in sentence["variables"].items():
                text = text.replace(name, value)
            yield text


def array(field: str) -> Callable[[bytes], Iterator[str]]:
    """A JSON list of objects."""

    def read(raw: bytes) -> Iterator[str]:
        yield from (row[field] for row in json.loads(raw))

    return read


def alpaca_eval(*datasets: str) -> Callable[[bytes], Iterator[str]]:
    def read(raw: bytes) -> Iterator[str]:
        yield from (row["instruction"] for row in json.loads(raw) if row["dataset"] in datasets)

    return read


def wizard(raw: bytes) -> Iterator[str]:
    """WizardLM's tests but for those of other domains here."""
    for line in raw.decode().splitlines():
        row = json.loads(line)
        if row["Skill"] not in ("Math", "Code Generation", "Code Debug", "Debugging", "Counterfactual"):
            yield row["Instruction"]


def mt_bench(raw: bytes) -> Iterator[str]:
    for line in raw.decode().splitlines():
        row = json.loads(line)
        if row["category"] in ("writing", "roleplay", "humanities", "extraction", "stem"):
            yield row["turns"][0]


def self_instruct(raw: bytes) -> Iterator[str]:
    for line in raw.decode().splitlines():
        row = json.loads(line)
        if row["motivation_app"] not in ("Leetcode", "MySQL", "StackOverflow", "Wolfram alpha", "Python", "Excel"):
            yield f"{row['instruction']}\n\n{row['instances'][0]['input']}".strip()


def snips(raw: bytes) -> Iterator[str]:
    (intent,) = json.loads(raw.decode("latin-1")).values()
    for row in intent:
        yield "".join(part["text"] for part in row["data"])


def restaurant8k(raw: bytes) -> Iterator[str]:
    for row in json.loads(raw):
        if len(row["userInput"]["text"].split()) > 3:
            yield row["userInput"]["text"]


def bash(raw: bytes) -> Iterator[str]:
    yield from raw.decode().splitlines()


_QWEN, _T2S = "QwenLM/Qwen2.5-Math", "jkkummerfeld/text2sql-data"
_EVAL = ("tatsu-lab/alpaca_eval", "results/claude-2/model_outputs.json")
_NUMPY = "cert/pandas-numpy-eval/data/NumpyEval.jsonl.gz"
_PANDAS = "cert/pandas-numpy-eval/data/PandasEval.jsonl.gz"
_SNIPS = "2017-06-custom-intent-engines/{0}/validate_{0}.json"
_RESTAURANT = "span_extraction/restaurant8k/test.json"
_USER = "human_eval/user_oriented_instructions.jsonl"
_TORCH = "apicoder/private-eval/data/real_torchdata_eval_v3.jsonl.gz"
_HOTELS = "nlupp/data/hotels/fold0.json"
_SYN = "Spider-Syn/dev.json"
_MT = "fastchat/llm_judge/data/mt_bench/question.jsonl"
SOURCES = (
    Source("aqua", "math", "google-deepmind/AQuA", "test.json", lines("question", "options"), "choice"),
    Source("asdiv", "math", _QWEN, "evaluation/data/asdiv/test.jsonl", lines("body", "question"), "choice"),
    Source("college_math", "math", _QWEN, "evaluation/data/college_math/test.jsonl", lines("question"), "choice"),
    Source("sat_math", "math", _QWEN, "evaluation/data/sat_math/test.jsonl", lines("question", "options"), "choice"),
    Source("odex", "code", "zorazrw/odex", "data/en_test.jsonl", lines("intent"), "choice"),
    Source(
        "numpy_eval",
        "code",
        "microsoft/PyCodeGPT",
        _NUMPY,
        lines("prompt"),
        "choice",
    ),
    Source(
        "ncb_python",
        "code",
        "THUDM/NaturalCodeBench",
        "problems/ncb_python_en.jsonl",
        lines("prompt"),
        "choice",
    ),
    Source("spider_dk", "sql", "ygan/Spider-DK", "Spider-DK.json", array("question"), "choice"),
    Source("t2s_academic", "sql", _T2S, "data/academic.json", text2sql, "choice"),
    Source("t2s_scholar", "sql", _T2S, "data/scholar.json", text2sql, "choice"),
    Source("wizardlm", "instruct", "nlpxucan/WizardLM", "WizardLM/data/WizardLM_testset.jsonl", wizard, "choice"),
    Source("eval_helpful", "instruct", *_EVAL, alpaca_eval("helpful_base"), "choice"),
    Source("eval_oasst", "instruct", *_EVAL, alpaca_eval("oasst"), "choice"),
    Source("snips_weather", "other", "sonos/nlu-benchmark", _SNIPS.format("GetWeather"), snips, "choice"),
    Source("restaurant8k", "other", "PolyAI-LDN/task-specific-datasets", _RESTAURANT, restaurant8k, "choice"),
    Source("olympiad", "math", _QWEN, "evaluation/data/olympiadbench/test.jsonl", lines("question"), "final"),
    Source("minerva", "math", _QWEN, "evaluation/data/minerva_math/test.jsonl", lines("problem"), "final"),
    Source("gaokao", "math", _QWEN, "evaluation/data/gaokao2023en/test.jsonl", lines("question"), "final"),
    Source("mawps", "math", _QWEN, "evaluation/data/mawps/test.jsonl", lines("input"), "final"),
    Source("pandas_eval", "code", "microsoft/PyCodeGPT", _PANDAS, lines("prompt"), "final"),
    Source("ncb_java", "code", "THUDM/NaturalCodeBench", "problems/ncb_java_en.jsonl", lines("prompt"), "final"),
    Source("nl2bash", "code", "TellinaTool/nl2bash", "data/bash/all.nl", bash, "final"),
    Source("t2s_yelp", "sql", _T2S, "data/yelp.json", text2sql, "final"),
    Source("wikisql", "sql", _T2S, "data/wikisql.json.bz2", text2sql, "final"),
    Source("self_instruct_user", "instruct", "yizhongw/self-instruct", _USER, self_instruct, "final"),
    Source("eval_koala", "instruct", *_EVAL, alpaca_eval("koala"), "final"),
    Source("mt_bench", "instruct", "lm-sys/FastChat", _MT, mt_bench, "final"),
    Source("snips", "other", "sonos/nlu-benchmark", _SNIPS.format("PlayMusic"), snips, "final"),
    Source("snips_book", "other", "sonos/nlu-benchmark", _SNIPS.format("BookRestaurant"), snips, "final"),
    Source("carp", "math", _QWEN, "evaluation/data/carp_en/test.jsonl", lines("content"), "last"),
    Source("aime", "math", _QWEN, "evaluation/data/aime24/test.jsonl", lines("problem"), "last"),
    Source("amc", "math", _QWEN, "evaluation/data/amc23/test.jsonl", lines("question"), "last"),
    Source("class_eval", "code", "FudanSELab/ClassEval", "data/ClassEval_data.json", array("skeleton"), "last"),
    Source("torchdata_eval", "code", "microsoft/PyCodeGPT", _TORCH, lines("prompt"), "last"),
    Source("spider_syn", "sql", "ygan/Spider-Syn", _SYN, array("SpiderSynQuestion"), "last"),
    Source("wild", "instruct", "XueFuzhao/InstructionWild", "data_v2/user_1.jsonl", lines("instruction"), "last"),
    Source("nlupp_hotels", "other", "PolyAI-LDN/task-specific-datasets", _HOTELS, array("text"), "last"),
    Source("snips_playlist", "other", "sonos/nlu-benchmark", _SNIPS.format("AddToPlaylist"), snips, "last"),
)  # fmt: skip


def reread(query: str) -> str | None:
    """The domain of a query of `choice` whose source says `instruct`, but whose text asks for something else.

    `reread.txt` has what somebody found who read all 479 rows of instruct: hash, domain and source.
    """
    return _reread().get(hashlib.sha256(query.encode()).hexdigest()[:12])


@functools.cache
def _reread() -> dict[str, str]:
    lines = (Path(__file__).parent / "reread.txt").read_text().splitlines()
    return {line.split()[0]: line.split()[1] for line in lines}


def git(clones: Path, repository: str, *command: str) -> bytes:
    """What git says of a clone, OWNER+NAME in `clones`."""
    place = clones / repository.replace("/", "+")
    found = next((path for path in (place / "repo", place / ".git", place) if (path / "HEAD").exists()), None)
    if found is None:
        raise SystemExit(f"{place}: no clone of {repository} here")
    return subprocess.run(["git", f"--git-dir={found}", *command], check=True, capture_output=True).stdout


def read_bytes(clones: Path, repository: str, path: str) -> bytes:
    """A file of the newest commit of a clone."""
    return git(clones, repository, "show", f"HEAD:{path}")


def list_paths(clones: Path, repository: str) -> list[str]:
    """All files of the newest commit of a clone."""
    return git(clones, repository, "ls-tree", "-r", "--name-only", "-z", "HEAD").decode().rstrip("\0").split("\0")


def read_source(source: Source, clones: Path) -> list[dict[str, str]]:
    """At most `MOST` different queries of a source, in an order that the seed fixes."""
    raw = read_bytes(clones, source.repository, source.path)
    queries = list(dict.fromkeys(query.strip() for query in source.read(raw) if query.strip()))
    random.Random(_SEED).shuffle(queries)
    return [{"query": query, "domain": source.domain, "source": source.name} for query in queries[:MOST]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clones", type=Path, required=True)
    parser.add_argument("--split", choices=["choice", "final", "last"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for source in SOURCES:
        if source.split == options.split:
            found = read_source(source, options.clones)
            print(f"{source.name}: {source.domain} {len(found)}")
            rows += found
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()

"""Learn what tells kinds of request apart, from public sets of many tasks: `src/meswitch/router/tasks.safetensors`.

    python benchmarks/routing/tasks.py --encoder DIR[:8] --clones DIR --train train.jsonl \\
        --out src/meswitch/router/tasks.safetensors --data dev=dev.jsonl --data choice=choice.jsonl

CLONES holds a clone (bare or not) of each repository that `SOURCES` names, as OWNER+NAME. None of the sets that routing
is measured on is among them (`sources.py`, `boards.py` but for HWU64 and Stack Overflow titles), and no benchmark of
mathematics, code or text-to-SQL. TRAIN is the file that routers of the tables are trained on; of its rows those that
`described.py` holds out are left out, and alpaca, whose licence forbids it.

A step draws some tasks, five lines of each from some of its sources and queries from others, or some intents of one
source. The map is to make the lines of a query's own task its nearest. It stays near the identity. `--data`, files of
`described.py`, measures what the map does there, and what one does that has not seen one of the tasks (one draw each);
results go to results/routing-tasks.json.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from meswitch.router import DescribedRouter, Row, Space, evaluate_router, open_encoder, read_rows

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there
from benchmarks.routing.described import lines, seen_and_held_out
from benchmarks.routing.run import Remembering
from benchmarks.routing.sources import list_paths, read_bytes

RESULTS = Path(__file__).parents[1] / "results" / "routing-tasks.json"
RANK = 32  # of the map: 98 kB in float16; the rest of it changes nothing
_LINES, _QUERIES = 5, 10  # of a task, in a step
_STEPS, _RATE, _NEAR = 1500, 1e-3, 0.03  # steps, learning rate, how much nearness to the identity counts
_INTENTS = 0.3  # share of the steps that are about the intents of one source
_MIXED = 0.5  # share of a task's draws whose lines are also from the sources of its queries
_SOFTNESS = 0.1  # how far lines behind the nearest one count
DRAWS = 3  # maps that are averaged
_LEAST = 15  # texts of an intent
_CHARACTERS = 1500  # of a text

Found = Iterator[tuple[str, str]]  # label ("" where there is none), text


@dataclass(frozen=True)
class Clone:
    """A clone of one repository."""

    clones: Path
    repository: str

    def paths(self, pattern: str) -> list[str]:
        """Of its newest commit, those in which the pattern is found, in an order that a seed fixes."""
        found = [path for path in list_paths(self.clones, self.repository) if re.search(pattern, path)]
        random.Random(0).shuffle(found)
        return found

    def bytes(self, path: str) -> bytes:
        return read_bytes(self.clones, self.repository, path)

    def text(self, path: str) -> str:
        return self.bytes(path).decode("utf-8", "replace")


def exercises(clone: Clone) -> Found:
    """Exercises of a textbook in LaTeX."""
    for path in clone.paths(r"\.tex$"):
        for text in re.findall(r"\\begin\{exercise\}(.*?)\\end\{exercise\}", clone.text(path), re.DOTALL):
            text = re.sub(r"(?<!\\)%.*", "", text)
            text = re.sub(r"\\(label|index|pagebreak|vspace|task|leavevmode)\b\*?(\[[^\]]*\])?(\{[^{}]*\})?", "", text)
            text = re.sub(r"\\(begin|end)\{(enumerate|tasks|itemize)\}(\[[^\]]*\])?(\([^)]*\))?", "", text)
            text = re.sub(r"\\(emph|text|myquote)\{([^{}]*)\}", r"\2", text)
            text = re.sub(r"^\s*\[[^\]]*\]", "", re.sub(r"\n\s*\n+", "\n", text)).strip()
            if 15 < len(text) < 900:
                yield "", text


def instructions(path: str, leave: str) -> Callable[[Clone], Found]:
    """A JSON list of instruction and input; those that have the pattern `leave` are left out."""

    def read(clone: Clone) -> Found:
        for row in json.loads(clone.text(path)):
            request = row["instruction"].split(")\n")[-1]  # a list of tools may stand before it
            text = f"{request}\n\n{row['input']}".strip()
            if not re.search(leave, text):
                yield "", text

    return read


def snippets(clone: Clone) -> Found:
    for path in clone.paths(r"^snippets/.*\.md$"):
        if match := re.search(r"---.*?---\s+(.*?)\n", clone.text(path), re.DOTALL):
            yield "", match[1]


def titles(clone: Clone) -> Found:
    texts, tags = (clone.text(f"rawText/{name}_StackOverflow.txt").splitlines() for name in ("title", "label"))
    yield from zip(tags, texts, strict=True)


def functions(clone: Clone) -> Found:
    """A module's first function up to the end of its docstring."""
    for path in clone.paths(r"\.py$"):
        pattern = r'^def \w+\([^)]*\)[^:]*:\s*\n\s+(r?""".*?""")'
        if match := re.search(pattern, clone.text(path), re.DOTALL | re.MULTILINE):
            yield "", match[0][:700]


def commands(clone: Clone) -> Found:
    for path in clone.paths(r"^pages/(common|linux)/.*\.md$")[:700]:
        for line in re.findall(r"^- (.+?):?$", clone.text(path), re.MULTILINE):
            yield "", re.sub(r"[\[\]`]", "", line)


def prompts(clone: Clone) -> Found:
    """T0's tasks in the words of its templates, six of each."""
    for path in clone.paths(r"per_template/"):
        if not re.search(r"hellaswag|arc_|commonsense_qa|qasc|sciq|trec", path):
            texts = [json.loads(line)["prompt"] for line in clone.text(path).splitlines()[:40]]
            texts = [text for text in texts if len(text) < 4000]
            random.Random(0).shuffle(texts)
            yield from (("", text) for text in texts[:6])


def trivia(clone: Clone) -> Found:
    """60 of each category, every fifth with its options."""
    for path in clone.paths("^categories/"):
        rows = re.findall(r"#Q (.*)\n\^ .*\n((?:[A-D] .*\n?)+)", clone.text(path))
        random.Random(1).shuffle(rows)
        for i, (question, options) in enumerate(rows[:60]):
            yield "", question.strip() + ("\n" + options.strip() if i % 5 == 0 else "")


def conversations(clone: Clone) -> Found:
    for line in clone.text("model/model_eval/manual/data/en_100_message.jsonl").splitlines():
        row = json.loads(line)
        if row["role"] == "prompter" and not row["parent_id"]:
            yield "", row["text"]


def chatter(clone: Clone) -> Found:
    text = clone.text("chatterbot_corpus/data/english/coding.yml")
    yield from (("", line.strip("\"'")) for line in re.findall(r"^- - (.+)$", text, re.MULTILINE))


def schema_guided(clone: Clone) -> Found:
    """Turns that say for the first time what is wanted."""
    for number in range(1, 128, 3):
        try:
            dialogues = json.loads(clone.bytes(f"train/dialogues_{number:03d}.json"))
        except (ValueError, subprocess.CalledProcessError):
            continue  # the clone lacks its largest files
        for turn in (turn for dialogue in dialogues for turn in dialogue["turns"] if turn["speaker"] == "USER"):
            for frame in turn["frames"]:
                for action in frame["actions"]:
                    if action["act"] == "INFORM_INTENT":
                        yield f"{frame['service'].split('_')[0]}.{action['values'][0]}", turn["utterance"]


def rasa(clone: Clone) -> Found:
    """Intents of several assistants but for the banking one."""
    for path in clone.paths(r"^(?!banking).*nlu\.yml$"):
        label = ""
        for line in clone.text(path).splitlines():
            if match := re.match(r"\s*- (intent|synonym|regex|lookup): *(\S+)", line):
                label = f"{path.split('/')[0]}.{match[2]}" if match[1] == "intent" else ""
            elif label and (match := re.match(r"\s+- (.+)", line)):
                yield label, re.sub(r"\[([^\]]+)\](\([^)]*\)|\{[^}]*\})", r"\1", match[1])


def skills(clone: Clone) -> Found:
    """Intents of skills in the .lu format; each skill is there more than once."""
    seen = set()
    for path in sorted(clone.paths(r"(en-us|/en)/.*\.lu$")):
        skill, label = path.split("/")[-1].lower(), ""
        if skill in seen or ("skill" in skill and not re.search("music|weather|bing", skill)):
            continue
        seen.add(skill)
        for line in clone.text(path).splitlines():
            if match := re.match(r"#+ *(?!!)(\w+)", line):
                label = match[1]
            elif line[:1] in ("@", "$"):
                label = ""
            elif label and label.lower() != "none" and (match := re.match(r"\s*- *(.+)", line)):
                text = match[1]
                for _ in range(3):  # entities lie in each other
                    text = re.sub(r"\{@?[\w.:]+=([^{}]*)\}", r"\1", text)
                if "{" not in text:
                    yield f"{skill}.{label}", text


def home(clone: Clone) -> Found:
    texts, labels = (clone.text(f"Datasets/HWU64/train/{name}").splitlines() for name in ("seq.in", "label"))
    yield from ((label.strip(), text.strip()) for label, text in zip(labels, texts, strict=True))


def patterns() -> list[str]:
    """Questions to databases of `patterns.toml`, three rounds of fourteen patterns a table."""
    data = tomllib.loads((Path(__file__).parent / "patterns.toml").read_text())
    draw, found = random.Random(5), []
    for table in data["tables"] * 3:
        one, group, numbers, texts, values = (
            [part.strip() for part in field.split(sign)]
            for field, sign in zip(table.split("|"), (",", ",", ",", ",", ";"), strict=True)
        )
        for pattern in draw.sample(data["patterns"], 14):
            n, n2 = draw.sample(numbers, 2)
            t, t2 = draw.sample(texts, 2)
            v, v2 = draw.sample(values, 2)
            found.append(pattern.format(
                e=one[0], es=one[1], f=group[0], fs=group[1], n=n, n2=n2, t=t, t2=t2, v=v, v2=v2,
                k=draw.choice([3, 10, 50, 100, 2000]), k2=draw.choice([5, 20, 400, 90000]),
                s=draw.choice(["two", "three", "5", "10"]), y=draw.choice([1999, 2010, 2018, 2021]),
                name=draw.choice(data["names"]),
            ))  # fmt: skip
    return found


_GPT, _CODE = "teknium1/GPTeacher", r"\bSQL\b"


@dataclass(frozen=True)
class Source:
    """most: of its texts. intents: whether its labels are intents."""

    name: str
    task: str
    repository: str
    licence: str
    read: Callable[[Clone], Found]
    most: int
    intents: bool = False


SOURCES = (
    Source("Basic Analysis", "math", "jirilebl/ra", "CC BY-SA 4.0", exercises, 500),
    Source("Differential Equations", "math", "jirilebl/diffyqs", "CC BY-SA 4.0", exercises, 500),
    Source("GPTeacher, code", "code", _GPT, "MIT", instructions("Codegen/codegen-instruct.json", _CODE), 800),
    Source("30 seconds of code", "code", "30-seconds/30-seconds-of-code", "CC0", snippets, 600),
    Source("Stack Overflow titles", "code", "jacoxu/StackOverflow", "CC BY-SA", titles, 1500, True),
    Source("The Algorithms", "code", "TheAlgorithms/Python", "MIT", functions, 700),
    Source("ChatterBot, coding", "code", "gunthercox/chatterbot-corpus", "BSD", chatter, 300),
    Source("tldr", "command line", "tldr-pages/tldr", "CC BY 4.0", commands, 1200),
    Source("GPTeacher, roles", "assistant", _GPT, "MIT",
           instructions("Roleplay/roleplay-simple-deduped-roleplay-instruct.json", "^$"), 800),
    Source("GPTeacher, tools", "assistant", _GPT, "MIT",
           instructions("Toolformer/toolformer-similarity-0.9-dataset.json", "toolformer"), 600),
    Source("T0's prompts", "assistant", "yizhongw/self-instruct", "Apache-2.0", prompts, 1200),
    Source("OpenTriviaQA", "assistant", "uberspot/OpenTriviaQA", "CC BY-SA 4.0", trivia, 900),
    Source("Open Assistant", "assistant", "LAION-AI/Open-Assistant", "Apache-2.0", conversations, 300),
    Source("Schema-Guided Dialogue", "app", "google-research-datasets/dstc8-schema-guided-dialogue", "CC BY-SA 4.0",
           schema_guided, 4000, True),
    Source("Rasa", "app", "RasaHQ/NLU-training-data", "Apache-2.0", rasa, 2500, True),
    Source("Bot Framework skills", "app", "microsoft/botframework-solutions", "MIT", skills, 3000, True),
    Source("HWU64", "app", "jianguoz/Few-Shot-Intent-Detection", "CC BY 4.0", home, 9000, True),
)  # fmt: skip
_TRAINING = {"math": "math", "code": "code", "sql": "database", "instruct": "assistant"}  # domain -> task
_TRAINING_MOST = 700  # of a source of the training rows
_LEFT_OUT = ("alpaca",)


@dataclass(frozen=True)
class Text:
    task: str
    source: str
    label: str
    text: str


def collect(clones: Path, train: Path) -> list[Text]:
    """The texts of all sources."""
    found: list[Text] = []

    def take(task: str, source: str, items: Iterable[tuple[str, str]], most: int) -> None:
        kept = {text.strip(): label for label, text in items if text.strip()}
        texts = [Text(task, source, label, text[:_CHARACTERS]) for text, label in kept.items()]
        random.Random(0).shuffle(texts)
        found.extend(texts[:most])
        print(f"{source}: {task}, {len(texts[:most])} of {len(texts)}", flush=True)

    for source in SOURCES:
        rows = source.read(Clone(clones, source.repository))
        take(source.task, source.name, rows if source.intents else (("", text) for _, text in rows), source.most)
    take("database", "patterns", (("", text) for text in patterns()), 1500)
    rows, _ = seen_and_held_out(read_rows(train, list(_TRAINING)))
    for name in sorted({(row.domain, row.source) for row in rows if row.domain in _TRAINING}):
        if name[1] not in _LEFT_OUT:
            own = [row.query.removeprefix("Write a SQL query: ") for row in rows if (row.domain, row.source) == name]
            take(_TRAINING[name[0]], name[1], (("", text) for text in own), _TRAINING_MOST)
    return found


class Steps:
    """Draws of lines and queries, of tasks or of intents.

    Args:
        texts: of all sources.
    """

    def __init__(self, texts: list[Text], seed: int) -> None:
        self.draw, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        tasks: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        intents: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, text in enumerate(texts):
            tasks[text.task][text.source].append(i)
            if text.label:
                intents[text.source][text.label].append(i)
        self.tasks = {task: [torch.tensor(rows) for rows in own.values()] for task, own in tasks.items()}
        enough = [[torch.tensor(rows) for rows in own.values() if len(rows) >= _LEAST] for own in intents.values()]
        self.intents = [own for own in enough if len(own) > 3]

    def next(self) -> tuple[Tensor, Tensor]:
        """[tasks, lines], [tasks, queries] int64: which texts."""
        return self.of_intents() if self.draw.random() < _INTENTS else self.of_tasks()

    def of_intents(self) -> tuple[Tensor, Tensor]:
        """The same, of intents of one source."""
        own = self.draw.choice(self.intents)
        return _stacked(
            self._of_intent(rows) for rows in self.draw.sample(own, min(len(own), self.draw.randint(4, 12)))
        )

    def of_tasks(self) -> tuple[Tensor, Tensor]:
        """The same, of tasks."""
        names = self.draw.sample(list(self.tasks), min(len(self.tasks), self.draw.randint(3, 6)))
        return _stacked(self._of_task(self.tasks[name]) for name in names)

    def _of_intent(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = rows[torch.randperm(len(rows), generator=self.generator)[:_LEAST]]
        return chosen[:_LINES], chosen[_LINES:]

    def _of_task(self, sources: list[Tensor]) -> tuple[Tensor, Tensor]:
        sources = self.draw.sample(sources, len(sources))
        cut = self.draw.randint(1, max(1, len(sources) - 1))
        some, rest = sources[:cut], sources[cut:] or sources
        return self._any(sources if self.draw.random() < _MIXED else some, _LINES), self._any(rest, _QUERIES)

    def _any(self, sources: list[Tensor], count: int) -> Tensor:
        drawn = [self.draw.choice(sources) for _ in range(count)]
        return torch.stack([rows[torch.randint(len(rows), (), generator=self.generator)] for rows in drawn])


def _stacked(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    lines, queries = zip(*pairs, strict=True)
    return torch.stack(lines), torch.stack(queries)


def nearness(lines: Tensor, queries: Tensor) -> Tensor:
    """[queries, tasks]: how near the nearest lines are. lines: [tasks, lines, width], queries: [queries, width]."""
    points = lines.flatten(0, 1)
    near = queries @ points.T - points.square().sum(1) / 2
    return _SOFTNESS * (near / _SOFTNESS).unflatten(1, lines.shape[:2]).logsumexp(2)


def learn(texts: list[Text], vectors: Tensor, seed: int) -> Tensor:
    """[width, width]: the map, near the identity."""
    steps, identity = Steps(texts, seed), torch.eye(vectors.shape[1], device=vectors.device)
    found = identity.clone().requires_grad_()
    sharpness = torch.tensor(3.0, device=vectors.device, requires_grad=True)  # its logarithm
    optimiser = torch.optim.Adam([{"params": [found], "lr": _RATE}, {"params": [sharpness], "lr": 10 * _RATE}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    total = 0.0
    for _ in range(_STEPS):
        lines, queries = steps.next()
        targets = torch.arange(len(queries), device=vectors.device).repeat_interleave(queries.shape[1])
        scores = nearness(vectors[lines] @ found, vectors[queries.flatten()] @ found)
        loss = cross_entropy(scores * sharpness.exp(), targets) + _NEAR * (found - identity).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        total += loss.item() / _STEPS
    print(f"draw {seed}: mean loss {total:.3f}", flush=True)
    return found.detach()


def parts(found: Tensor, background: Tensor) -> dict[str, Tensor]:
    """`scale` [1] and `left` and `right` [width, RANK] float16, see `meswitch.router.described.Form`.

    Args:
        found: [width, width].
        background: [n, width], vectors of everyday requests, whose mean square stays as it is.
    """
    u, s, v = torch.linalg.svd(found - torch.eye(len(found)))
    left, right = u[:, :RANK] * s[:RANK].sqrt(), v[:RANK].T * s[:RANK].sqrt()
    mapped = background + (background @ left) @ right.T
    scale = (background.square().sum() / mapped.square().sum()).sqrt()
    return {"scale": scale[None], "left": left.half().contiguous(), "right": right.half().contiguous()}


def measured(space: Space, data: dict[str, list[Row]]) -> dict[str, dict]:
    """Share right by five lines a domain with the space's form, means over the sets of lines."""
    found = {}
    for name, rows in data.items():
        results = [evaluate_router(DescribedRouter(given, space), rows) for given in lines().values()]
        domains = {domain: mean(result.per_domain[domain] for result in results) for domain in _TRAINING}
        found[name] = {"accuracy": mean(result.accuracy for result in results), "per_domain": domains}
        found[name]["auroc"] = mean(result.auroc for result in results if result.auroc is not None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, metavar="DIR[:8]", help="8: int8 linear layers")
    parser.add_argument("--clones", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="where to write what is learnt from all tasks")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=FILE", help="measure with each task left out"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    directory, _, bits = options.encoder.partition(":")
    space = Space(Remembering(open_encoder(directory, bits=int(bits or 32), updated=False)), learnt=False)
    plain, rows = space.form, len(space.low) * space.encoder.hidden_size
    of_form = lambda x: plain(x)[:, :rows]  # noqa: E731
    texts = collect(options.clones, options.train)
    vectors = of_form(space([text.text for text in texts], space.low))
    counts = Counter(text.task for text in texts)
    if options.out:
        tensors = parts(sum(learn(texts, vectors, seed) for seed in range(DRAWS)) / DRAWS, of_form(space.background))
        about = {"encoder": space.encoder.fingerprint, "texts": json.dumps(counts), "date": time.strftime("%Y-%m-%d")}
        save_file(tensors, options.out, about)
    if options.data:
        data = {
            name: read_rows(file, list(_TRAINING)) for name, _, file in (text.partition("=") for text in options.data)
        }
        found = {"nothing learnt": measured(space, data)}
        for task in (None, *counts):
            kept = [i for i, text in enumerate(texts) if text.task != task]
            learnt = learn([texts[i] for i in kept], vectors[kept], 0)
            space.form = plain.with_learnt(parts(learnt, of_form(space.background)))
            found["all tasks" if task is None else f"without {task}"] = measured(space, data)
        sources = [{"name": s.name, "task": s.task, "repository": s.repository, "licence": s.licence} for s in SOURCES]
        meta = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "bits": bits, "texts": counts}
        RESULTS.write_text(json.dumps({"meta": meta, "sources": sources, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

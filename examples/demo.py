"""The whole of meswitch on a real family: compress four fine-tunes, train a router, serve, ask, count.

    make demo          (or: python examples/demo.py [--fresh] [--json FILE])

Every step is the command that a user would type. The experts and the router do not need each other, so as many of them
are made at a time as there are cores. The questions go through the `openai` client, all at once.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from meswitch.cli.console import quiet
from meswitch.units import format_bytes

if TYPE_CHECKING:  # what loads torch is imported when the commands, which load it too, are done
    from meswitch.family import Family
    from meswitch_lab.toy import Question

EXAMPLE = Path(__file__).parent / "family"
QUESTIONS = {"math": 12, "code": 10, "instruct": 10, "sql": 8}
MAX_TOKENS = 56  # of an answer
SEED = 7  # the experts were trained on draws of seed 1
COLUMNS = ("expert", "before", "after", "bits/weight", "full", "compressed", "base", "auto", "routed")
MESWITCH = [sys.executable, "-m", "meswitch"]
console = Console(width=max(100, Console().width))


@dataclass(frozen=True)
class Answer:
    """What came back for one question."""

    text: str
    served_by: str
    tokens: int


def together(commands: list[list[str]]) -> None:
    """Run commands, as many at a time as there are cores, and show what they say."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ

    def run(command: list[str]) -> None:
        console.print(f"[bold]$ meswitch {' '.join(command)}[/]", soft_wrap=True)
        with subprocess.Popen(
            [*MESWITCH, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                is_table = line.startswith(" ") or not line.strip()
                said += [line] if is_table else []
                if not is_table:
                    console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
            console.print("".join(said).rstrip(), markup=False, highlight=False, soft_wrap=True)
        if process.returncode:
            sys.exit(f"meswitch {command[0]} failed; its message is above")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
        for job in [pool.submit(run, command) for command in commands]:
            job.result()


@contextmanager
def server(family: Path) -> Iterator[Callable[[], dict]]:
    """A starting `meswitch serve`; what is given waits until it runs and returns its summary."""
    command = ["serve", str(family), "--port", "0", "--json"]
    console.print(f"\n[bold]$ meswitch {' '.join(command)}[/]", soft_wrap=True)
    process = subprocess.Popen([*MESWITCH, *command], stdout=subprocess.PIPE, text=True)
    try:
        yield lambda: started(process)
    finally:
        process.terminate()
        process.wait(timeout=60)


def started(process: subprocess.Popen) -> dict:
    """What a server says when it runs."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit("the server did not start; its message is above")
    summary = json.loads(line)
    console.print(f"{summary['url']}: {len(summary['experts'])} experts, {summary['slots']} slots")
    return summary


async def ask_all(url: str, questions: "list[Question]", models: list[str]) -> tuple[list[Answer], float]:
    """All questions at once; the answers in their order, and the seconds it took."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="unused", timeout=300) as client:

        async def ask(question: "Question", model: str) -> Answer:
            reply = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question.prompt}], max_tokens=MAX_TOKENS
            )
            tokens = reply.usage.completion_tokens if reply.usage else 0
            return Answer(reply.choices[0].message.content or "", reply.model, tokens)

        started = time.perf_counter()
        answers = await asyncio.gather(*map(ask, questions, models))
        return list(answers), time.perf_counter() - started


def full_answers(family: "Family", questions: "list[Question]") -> list[str]:
    """Each question answered by its uncompressed fine-tune, with plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from meswitch.evaluate import answer

    texts: dict[str, str] = {}
    for section in family.expert:
        source = family.source_of(section)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        prompts = [q.prompt for q in questions if q.domain == section.name]
        texts |= zip(prompts, answer(model, AutoTokenizer.from_pretrained(source), prompts, MAX_TOKENS), strict=True)
    return [texts[q.prompt] for q in questions]


def share_right(questions: "list[Question]", texts: list[str], full: list[str], domain: str) -> str:
    """How many of a domain's answers are right. SQL has no exact check: right is what the full fine-tune says."""
    rows = [(q, text, wanted) for q, text, wanted in zip(questions, texts, full, strict=True) if q.domain == domain]
    right = sum(q.check(text) if q.check else text == wanted for q, text, wanted in rows)
    return f"{right}/{len(rows)}"


def rows(
    family: "Family", questions: "list[Question]", results: dict[str, list[Answer]], full: list[str]
) -> list[list[str]]:
    """One row an expert, as `COLUMNS`."""
    from meswitch import Artifact

    texts = {way: [a.text for a in answers] for way, answers in results.items()}
    found = []
    for section in family.expert:
        artifact = Artifact.open(family.resolve(section.delta))
        mine = [a for q, a in zip(questions, results["auto"], strict=True) if q.domain == section.name]
        found.append(
            [
                section.name,
                format_bytes(artifact.manifest.expert.bytes),
                format_bytes(artifact.nbytes),
                f"{artifact.bits_per_weight:.2f}",
                share_right(questions, full, full, section.name),
                *(share_right(questions, texts[way], full, section.name) for way in ("named", "base", "auto")),
                f"{sum(a.served_by == section.name for a in mine)}/{len(mine)}",
            ]
        )
    return found


def report(found: list[list[str]]) -> Table:
    table = Table(title="\nThe same questions to the full fine-tune, the compressed expert, the base, and auto")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "expert" else "right")
    for row in found:
        table.add_row(*row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="compress and train again what is there already")
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    began = time.perf_counter()
    again = ["--overwrite"] if options.fresh else []
    compressions = [["compress", "--family", str(EXAMPLE), "--expert", name, *again] for name in reversed(QUESTIONS)]
    together([*compressions, ["router", "train", "--family", str(EXAMPLE), "--data", str(EXAMPLE / "routing.jsonl")]])
    results: dict[str, list[Answer]] = {}
    seconds = 0.0
    with server(EXAMPLE) as running:
        console.print("while it starts: the questions to the full fine-tunes, one after another, with transformers")
        from meswitch.family import Family
        from meswitch_lab.toy import draw

        quiet()
        family = Family.load(EXAMPLE)
        questions = [q for domain, n in QUESTIONS.items() for q in draw(domain, n, SEED)]
        full = full_answers(family, questions)
        summary = running()
        console.print(f"asking {len(questions)} questions at once, three ways: auto, by the expert's name, the base")
        ways = {"auto": ["auto"] * len(questions), "named": [q.domain for q in questions]}
        ways["base"] = ["base"] * len(questions)
        for way, models in ways.items():
            results[way], took = asyncio.run(ask_all(summary["url"], questions, models))
            seconds = took if way == "auto" else seconds
    found = rows(family, questions, results, full)
    console.print(report(found))
    right = sum(a.served_by == q.domain for q, a in zip(questions, results["auto"], strict=True))
    tokens = sum(a.tokens for a in results["auto"])
    total = time.perf_counter() - began
    console.print(
        f"routed right: {right}/{len(questions)}; auto: {tokens} tokens in {seconds:.1f} s = {tokens / seconds:.0f} "
        f"tokens/s, {len(QUESTIONS)} experts in one batch. sql counts answers equal to the full fine-tune's.\n"
        f"In all {total:.0f} s."
    )
    if options.json:
        meta = {
            "date": datetime.now(UTC).date().isoformat(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        result = {"meta": meta, "rows": found, "routed": f"{right}/{len(questions)}", "tokens": tokens}
        result |= {"seconds": seconds, "total_seconds": total}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

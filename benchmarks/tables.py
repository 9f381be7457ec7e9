"""Fill the tables and figures of README.md from the stored results.

    python benchmarks/tables.py            rewrite what is out of date
    python benchmarks/tables.py --check    say so instead, and exit 1

A place to fill stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def pipe(*rows: list[str]) -> str:
    """Rows as a Markdown table, the first one its head; all columns but the first on the right."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def quality() -> str:
    """Accuracy and gain retained by setting and expert."""
    data = load("family-quality.json")
    head = ["setting", "bits/weight", "expert", "base", "full", "compressed", "gain retained", "KL, nats/token"]
    rows = []
    for row in data["rows"]:
        gain, score = row["gain"], row["score"]
        counts = ["-", "-", "-", "-"]
        if gain is not None:
            low, high = gain["interval"]
            counts = [str(gain["base"]), str(gain["expert"]), str(score["correct"])]
            counts.append(f"{gain['value']:.1%} [{low:.1%}, {high:.1%}]")
        bits = f"{row['bits_per_weight']:.2f}"
        rows.append([row["setting"], bits, row["model"], *counts, f"{row['fidelity']['kl']:.5f}"])
    meta = data["meta"]
    note = (
        f"Right answers of {meta['questions']}; gain retained = (compressed - base) / (full - base) with a 95 % "
        f"interval. sql has no exact check. torch {meta['torch']}, transformers {meta['transformers']}, {meta['date']}."
    )
    return f"{pipe(head, *rows)}\n\n{note}"


def demo() -> str:
    """What the demo measured."""
    data = load("demo.json")
    head = ["expert", "before", "after", "bits/weight", "full", "compressed", "base", "auto", "routed right"]
    note = (
        f"Routed right: {data['routed']}; {data['tokens']} tokens in {data['seconds']:.1f} s "
        f"({data['tokens'] / data['seconds']:.0f} tokens/s) on {data['meta']['cores']} CPU cores, the four experts in "
        f"one batch; the whole demo took {data['total_seconds']:.0f} s. {data['meta']['date']}."
    )
    return f"{pipe(head, *data['rows'])}\n\n{note}"


def memory() -> str:
    """One figure of the compression under a memory limit."""
    data = load("compress-memory-7b.json")
    sizes = f"({data['checkpoint_gb']:.1f} GB each) becomes a {data['artifact_gb']:.2f} GB artifact"
    limits = f"limited to {data['limit_gib']:.0f} GiB, with {data['peak_rss_gib']:.1f} GiB resident at most"
    return f"a Mistral-7B-shaped pair {sizes} in a process whose address space is {limits}"


PLACES: dict[str, tuple[Callable[[], str], bool]] = {
    "quality": (quality, True),
    "demo": (demo, True),
    "memory": (memory, False),
}


def filled(text: str) -> str:
    """The text with every place filled."""
    for name, (make, block) in PLACES.items():
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- end -->", re.S)
        if not pattern.search(text):
            continue
        content = f"\n\n{make()}\n\n" if block else make()
        text = pattern.sub(lambda _, n=name, c=content: f"<!-- {n} -->{c}<!-- end -->", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    file = ROOT / "README.md"
    old = file.read_text()
    new = filled(old)
    if new != old and check:
        sys.exit("README.md is older than benchmarks/results: run `python benchmarks/tables.py`")
    file.write_text(new)


if __name__ == "__main__":
    main()

"""Fill the tables of docs/routing.md from the stored results.

    python benchmarks/routing_doc.py            rewrite what is out of date
    python benchmarks/routing_doc.py --check    say so instead, and exit 1

Reads benchmarks/results/routing.json (`routing.py`) and, if it is there, benchmarks/results/routing-llm.json: one
object or a list of them, each with model, params, kind, accuracy, per_domain, ece, auroc, latency_ms and bytes.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markdown_tables import fill, has_place, pipe

ROOT = Path(__file__).parent.parent
EXPERTS = ("math", "code", "instruct", "sql")
LATER = "Not measured yet."


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def encoders(found: dict[str, Any]) -> str:
    """Figures on rows of the training sources, and on other data sets."""
    if not found:
        return LATER
    head = ["encoder", "rows", "accuracy", *EXPERTS, "sql without label", "ECE", "AUROC", "accepted", "MB", "CPU ms"]
    rows = [
        [
            name,
            kind,
            share(data["accuracy"]),
            *(share(data["per_domain"].get(expert)) for expert in EXPERTS),
            share(data["unlabelled"].get("sql")),
            share(data["ece"]),
            share(data["auroc"]),
            share(data["accepted_other"]),
            f"{data['bytes'] / 1e6:.0f}",
            f"{data['cpu_ms']['p50']:.1f} / {data['cpu_ms']['p95']:.1f}",
        ]
        for name, entry in found.items()
        for kind, data in (("held out", entry.get("held_out")), ("shift", entry.get("dev")))
        if data
    ]
    meta = next(iter(found.values()))["meta"]
    return f"{pipe(head, *rows)}\n\n{meta['date']}, torch {meta['torch']}, one thread."


def many(found: dict[str, Any]) -> str:
    """Accuracy and cost against the number of experts."""
    head = ["encoder", "experts", "accuracy", "CPU ms, p50", "heads, MB", "training, s"]
    rows = [
        [
            name,
            str(row["experts"]),
            share(row["accuracy"]),
            f"{row['cpu_ms']:.1f}",
            f"{row['head_bytes'] / 1e6:.1f}",
            f"{row['train_seconds']:.1f}",
        ]
        for name, entry in found.items()
        for row in entry.get("many", [])
    ]
    return pipe(head, *rows) if rows else LATER


def fifth(found: dict[str, Any]) -> str:
    """An expert from 16 examples."""
    head = ["encoder", "new expert", "others before", "others after", "the new one"]
    rows = [
        [name, expert, share(row["before"]), share(row["others_after"]), share(row["new"])]
        for name, entry in found.items()
        for expert, row in entry.get("fifth", {}).items()
    ]
    return pipe(head, *rows) if rows else LATER


def llm(data: Any) -> str:
    """What the LLM router's own benchmark stored."""
    if not data:
        return LATER
    head = ["model", "parameters", "variant", "data", "rows", "accuracy", *EXPERTS, "ECE", "AUROC", "latency, ms", "MB"]
    rows = [
        [
            str(row["model"]),
            f"{row['params'] / 1e6:.0f} M",
            str(row["variant"]),
            str(row["data"]),
            str(row["rows"]),
            share(row["accuracy"]),
            *(share(row["per_domain"].get(expert)) for expert in EXPERTS),
            share(row["ece"]),
            share(row["auroc"]),
            ", ".join(f"{key} {value:.1f}" for key, value in row["latency_ms"].items()),
            f"{row['bytes'] / 1e6:.0f}",
        ]
        for row in data["results"]
        if "per_domain" in row  # the others are what a calibration says of itself
    ]
    return pipe(head, *rows)


def filled(text: str, results: Path) -> str:
    """The text with every place filled."""

    def stored(name: str) -> Any:
        file = results / name
        return json.loads(file.read_text()) if file.exists() else {}

    found = stored("routing.json").get("encoders", {})
    places: dict[str, Callable[[], str]] = {
        "encoders": lambda: encoders(found),
        "many": lambda: many(found),
        "fifth": lambda: fifth(found),
        "llm": lambda: llm(stored("routing-llm.json")),
    }
    for name, make in places.items():
        if not has_place(text, name):
            raise SystemExit(f"<!-- {name} -->: no such place in the document")
        text = fill(text, name, make())
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--doc", type=Path, default=ROOT / "docs" / "routing.md")
    options = parser.parse_args(arguments)
    old = options.doc.read_text()
    new = filled(old, options.results)
    if options.check and new != old:
        sys.exit(f"{options.doc.name}: older than the results: run `python benchmarks/routing_doc.py`")
    if not options.check:
        options.doc.write_text(new)


if __name__ == "__main__":
    main()

"""Fill the tables, sentences and plots of docs/quality.md from the results of `quality.py`.

    python benchmarks/quality_doc.py            rewrite what is out of date
    python benchmarks/quality_doc.py --check    say so instead, and exit 1

A place to fill stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import quality_ablations
import quality_tables
from markdown_tables import fill, has_place, pipe
from quality_plots import PLOTS, digest, write
from quality_settings import SUITES
from quality_store import RESULTS, Store
from tables import ROOT

Stores = Mapping[str, Store]
LEVELS_FILE = RESULTS / "quality-levels.json"


def cost(stores: Stores) -> str:
    """Median seconds of a job's steps, by suite and method."""
    steps = ("compress", "load", "accuracy", "fidelity")
    rows = []
    for suite, store in stores.items():
        by_method: dict[str, list[dict]] = {}
        for job in store.jobs.values():
            if "failed" not in job:
                by_method.setdefault(job["keywords"].get("method", "me-switch"), []).append(job)
        for method, jobs in by_method.items():
            medians = [f"{statistics.median(job['seconds'][step] for job in jobs):.1f}" for step in steps]
            devices = ", ".join(sorted({store.runs[job["run"]]["device"] for job in jobs}))
            rows.append([suite, method, str(len(jobs)), *medians, devices])
    head = ["suite", "method", "jobs", *(f"{step}, s" for step in steps), "on"]
    return pipe(head, *rows) if rows else "Not measured yet."


def cost_7b(_: Stores) -> str:
    """What `compress_cost.py` measured, and `compress_family.py`."""
    parts = []
    file = RESULTS / "compress-cost-h100.json"
    if file.exists():
        data = json.loads(file.read_text())
        meta = data["meta"]
        head = ["Mistral-7B shapes", "layers measured", "s a layer", f"s for {meta['layers']} layers and the rest"]
        head += ["waits for reading, s", "encodes, s", "device GiB", "host GiB"]
        rows = [
            [
                row["setting"],
                str(row["layers_measured"]),
                f"{row['seconds_a_layer']:.2f}",
                f"{row['seconds_of_all_layers']:.0f}",
                *(f"{row['phases'][phase]:.1f}" for phase in ("wait_for_reader", "encode")),
                *(f"{row[where]:.1f}" for where in ("device_gib", "host_gib")),
            ]
            for row in data["rows"]
        ]
        parts.append(f"{pipe(head, *rows)}\n\n{meta['card']}, torch {meta['torch']}, {meta['date']}.")
    file = RESULTS / "compress-family-cpu.json"
    if file.exists():
        data = json.loads(file.read_text())
        meta = data["meta"]
        rows = [[row["expert"], str(row["steps"]), f"{row['seconds']:.0f}"] for row in data["rows"]]
        table = pipe(["example family", "steps of distillation", "s, the whole command"], *rows)
        parts.append(f"{table}\n\n{meta['machine']} CPU, {meta['cores']} cores, torch {meta['torch']}, {meta['date']}.")
    return "\n\n".join(parts) or "Not measured yet."


def provenance(stores: Stores) -> str:
    """The command, date, machine, versions and commit of every run that a stored job is from."""
    parts = []
    for store in stores.values():
        used = {job["run"] for job in store.jobs.values()}
        for number in sorted(used):
            run = store.runs[number]
            jobs = sum(job["run"] == number for job in store.jobs.values())
            parts.append(
                f"- `{run['command']}`: {jobs} jobs; {run['date']}, {run['device']}, Python {run['python']}, torch "
                f"{run['torch']}, transformers {run['transformers']}, meswitch {run['meswitch']}, "
                f"commit {run['commit'] or 'unknown'}"
            )
    return "\n".join(parts) or "Nothing is stored yet."


def levels(_: Stores) -> str:
    """What `quality_levels.py` measured."""
    if not LEVELS_FILE.exists():
        return "Not measured yet: `python benchmarks/quality_levels.py`."
    data = json.loads(LEVELS_FILE.read_text())
    meta, rows = data["meta"], data["rows"]
    cells = [
        [row["levels"], str(row["bits"]), row["expert"], f"{row['relative_error']:.3f}", f"{row['kl']:.5f}"]
        for row in rows
    ]
    for cell, row in zip(cells, rows, strict=True):
        cell.append(str(row.get("correct", "-")))
    head = ["levels", "bits", "expert", "relative error of the delta", "KL", f"right of {meta['questions']}"]
    least = {bits: min((r["kl"], r["levels"]) for r in rows if r["bits"] == bits) for bits in (2, 3, 4)}
    said = ", ".join(f"at {bits} bits {name}" for bits, (_, name) in least.items())
    return f"{pipe(head, *cells)}\n\nThe lowest KL has {said}. {meta['date']}, torch {meta['torch']}, {meta['device']}."


def large(_: Stores) -> str:
    """What `quality_large.py` measured."""
    file = RESULTS / "quality-large.json"
    if not file.exists():
        return "Not measured yet: `python benchmarks/quality_large.py`."
    data = json.loads(file.read_text())
    meta = data["meta"]
    head = ["base", "norm of the delta / norm of the base", "bits", "bpw", "full", "compressed", "KL"]
    rows = [
        [
            row["base"],
            f"{row['relative_norm']:.2f}",
            str(row["bits"]),
            f"{row['bits_per_weight']:.2f}",
            str(row["full"]),
            str(row["correct"]),
            f"{row['kl']:.5f}",
        ]
        for row in data["rows"]
    ]
    said = f"{meta['questions']} questions; {meta['device']}, torch {meta['torch']}, {meta['date']}."
    return f"{pipe(head, *rows)}\n\n{said}"


def plot(name: str, stores: Stores) -> str:
    data_of, _, title = PLOTS[name]
    return f"![{title}](quality/{name}.svg)" if data_of(stores) else "Not measured yet."


PLACES: dict[str, Callable[[Stores], str]] = {
    "family": lambda stores: quality_tables.family(stores["family"]),
    "frontier": lambda stores: quality_tables.frontier(stores["frontier"]),
    "pairs": lambda stores: quality_tables.pairs(stores["frontier"]),
    "ablations": lambda stores: quality_ablations.ablations(stores["ablations"]),
    "levels": levels,
    "large": large,
    "cost": cost,
    "cost 7b": cost_7b,
    "provenance": provenance,
    **{f"plot {name}": lambda stores, name=name: plot(name, stores) for name in PLOTS},
}


def filled(text: str, stores: Stores) -> str:
    """The text with every place filled."""
    for name, make in PLACES.items():
        if not has_place(text, name):
            raise SystemExit(f"<!-- {name} -->: no such place in the document")
        text = fill(text, name, make(stores))
    return text


def stale_plots(stores: Stores, directory: Path) -> dict[str, dict]:
    """The data of the plots whose files show others, or are missing; empty data: a file that must go."""
    found = {}
    for name, (data_of, _, _) in PLOTS.items():
        data, file = data_of(stores), directory / f"{name}.svg"
        drawn = file.read_text() if file.exists() else ""
        if (digest(data) not in drawn) if data else drawn:
            found[name] = data
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--redraw", action="store_true", help="draw all plots, not only those whose data changed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of quality-SUITE.json")
    parser.add_argument("--doc", type=Path, default=ROOT / "docs" / "quality.md")
    options = parser.parse_args(arguments)
    stores = {suite: Store.load(options.results / f"quality-{suite}.json") for suite in SUITES}
    plots = options.doc.parent / "quality"
    old = options.doc.read_text()
    new, stale = filled(old, stores), stale_plots(stores, plots)
    if options.check and (new != old or stale):
        what = [options.doc.name] * (new != old) + [f"quality/{name}.svg" for name in stale]
        sys.exit(f"{', '.join(what)}: older than the results: run `python benchmarks/quality_doc.py`")
    if options.check:
        return
    if options.redraw:
        stale = {name: data_of(stores) for name, (data_of, _, _) in PLOTS.items()}
    for name, data in stale.items():
        if data:
            write(name, data, plots / f"{name}.svg")
        else:
            (plots / f"{name}.svg").unlink(missing_ok=True)
    options.doc.write_text(new)


if __name__ == "__main__":
    main()

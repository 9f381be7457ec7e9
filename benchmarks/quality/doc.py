"""Fill the tables, sentences and plots of docs/results/quality.md from the results of `run.py`.

    python benchmarks/quality/doc.py            rewrite what is out of date
    python benchmarks/quality/doc.py --check    say so instead, and exit 1

A place to fill stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.common.generated import RESULTS, arguments_of, stored, update
from benchmarks.common.markdown_tables import pipe
from benchmarks.quality import ablations, family_tables, smollm2
from benchmarks.quality.plots import plots
from benchmarks.quality.settings import SUITES
from benchmarks.quality.store import Store

Stores = Mapping[str, Store]


def demo() -> str:
    """What the demo measured."""
    data = stored("demo.json")
    if data is None:
        return "Not measured yet: `python examples/demo.py --json benchmarks/results/demo.json`."
    head = ["expert", "before", "after", "bits/weight", "full", "compressed", "base", "auto", "routed right"]
    note = (
        f"Routed right: {data['routed']}; {data['tokens']} tokens in {data['seconds']:.1f} s "
        f"({data['tokens'] / data['seconds']:.0f} tokens/s) on {data['meta']['cores']} CPU cores, the four experts in "
        f"one batch; the whole demo took {data['total_seconds']:.0f} s. {data['meta']['date']}."
    )
    return f"{pipe(head, *data['rows'])}\n\n{note}"


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


def cost_7b() -> str:
    """What `compression/cost.py` measured, and `compression/family.py`."""
    parts = []
    if data := stored("compress-cost-h100.json"):
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
    if data := stored("compress-family-cpu.json"):
        meta = data["meta"]
        rows = [
            [row["expert"], str(row["steps"]), f"{row['seconds']:.0f}", f"{min(row['all']):.0f}–{max(row['all']):.0f}"]
            for row in data["rows"]
        ]
        table = pipe(["example family", "steps of distillation", "s, the whole command", "of several runs"], *rows)
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


def levels() -> str:
    """What `levels.py` measured."""
    data = stored("quality-levels.json")
    if data is None:
        return "Not measured yet: `python benchmarks/quality/levels.py`."
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


def large() -> str:
    """What `large.py` measured."""
    data = stored("quality-large.json")
    if data is None:
        return "Not measured yet: `python benchmarks/quality/large.py`."
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


def quantised() -> str:
    """What `quantised_base.py` measured."""
    data = stored("quality-quantised-base.json")
    if data is None:
        return "Not measured yet: `python benchmarks/quality/quantised_base.py`."
    meta, found = data["meta"], {(row["base"], row["way"], row["expert"]): row for row in data["rows"]}
    experts = list(dict.fromkeys(row["expert"] for row in data["rows"]))
    said = {
        "fine-tune": "the fine-tune, rounded",
        "plain delta": "a delta from the 16-bit base",
        "own delta": "a delta from the rounded base",
    }
    rows = []
    for base, way in dict.fromkeys((base, way) for base, way, _ in found):
        own = [found[base, way, expert] for expert in experts]
        name = "the fine-tune" if base == "16 bit" and way == "fine-tune" else said[way]
        rows.append([base, name, *(f"{row['correct']}" for row in own), *(f"{row['kl']:.5f}" for row in own)])
    head = ["base", "what is served", *experts, *(f"KL {expert}" for expert in experts)]
    note = f"Right of {meta['questions']} questions. {meta['date']}, torch {meta['torch']}, {meta['device']}."
    return f"{pipe(head, *rows)}\n\n{note}"


def places(stores: Stores) -> dict[str, str]:
    """What is to stand where."""
    return {
        "family": family_tables.family(stores["family"]),
        "frontier": family_tables.frontier(stores["frontier"]),
        "pairs": family_tables.pairs(stores["frontier"]),
        "ablations": ablations.ablations(stores["ablations"]),
        "demo": demo(),
        "levels": levels(),
        "large": large(),
        "quantised": quantised(),
        "cost": cost(stores),
        "cost 7b": cost_7b(),
        "provenance": provenance(stores),
    }


def main(arguments: list[str] | None = None) -> None:
    results = {"type": Path, "default": RESULTS, "help": "directory of quality-SUITE.json and smollm2.json"}
    options = arguments_of(__doc__, "results/quality.md", arguments, results=results)
    stores = {suite: Store.load(options.results / f"quality-{suite}.json") for suite in SUITES}
    pretrained = stored("smollm2.json", options.results)
    content = places(stores) | smollm2.places(pretrained)
    drawn = plots(stores) | smollm2.plots(pretrained)
    update(options.doc, "benchmarks/quality/doc.py", content, drawn, check=options.check, redraw=options.redraw)


if __name__ == "__main__":
    main()

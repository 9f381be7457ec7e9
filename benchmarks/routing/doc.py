"""Fill the tables of docs/results/routing.md from the stored results, and draw its plots.

    python benchmarks/routing/doc.py            rewrite what is out of date
    python benchmarks/routing/doc.py --check    say so instead, and exit 1

Reads benchmarks/results/routing.json (`run.py`) and, if they are there, benchmarks/results/routing-llm.json, which
`llm_router.py` and `cascade.py` write, and routing-described.json, routing-tasks.json, routing-boards.json,
routing-context.json and routing-claims.json, which the scripts of these names write.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.common.generated import RESULTS, arguments_of, stored, update
from benchmarks.common.markdown_tables import pipe
from benchmarks.routing.plots import knows_all, measured, plots

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
            # timed once, where nothing else ran: the rows decide little
            f"{data['cpu_ms']['p50']:.1f} / {data['cpu_ms']['p95']:.1f}" if kind == "held out" else "-",
        ]
        for name, entry in found.items()
        for kind, data in (("held out", entry.get("held_out")), ("shift", entry.get("dev")))
        if data
    ]
    meta = next(iter(found.values()))["meta"]
    return f"{pipe(head, *rows)}\n\n{meta['date']}, torch {meta['torch']}, one thread."


def bars(found: dict[str, Any]) -> str:
    """What the project asks of the embedding router, and who reaches it."""
    checks: list[tuple[str, Callable[[dict[str, Any], dict[str, Any]], bool]]] = [
        ("0.92 of all under shift", lambda _, dev: dev["accuracy"] >= 0.92),
        ("0.88 of every expert's under shift", lambda _, dev: min(dev["per_domain"][name] for name in EXPERTS) >= 0.88),
        ("AUROC 0.95 under shift", lambda _, dev: dev["auroc"] >= 0.95),
        ("at most 0.20 of `other` accepted under shift", lambda _, dev: dev["accepted_other"] <= 0.2),
        ("0.99 held out", lambda held, _: held["accuracy"] >= 0.99),
        ("ECE 0.03 held out", lambda held, _: held["ece"] <= 0.03),
        ("3 ms, p50", lambda held, _: held["cpu_ms"]["p50"] <= 3),
        ("100 MB", lambda held, _: held["bytes"] <= 100e6),
    ]
    both = {name: (entry["held_out"], entry["dev"]) for name, entry in found.items() if entry.get("dev")}
    if not both:
        return LATER
    rows = [[asked, *("yes" if met(*pair) else "no" for pair in both.values())] for asked, met in checks]
    return pipe(["asked for", *both], *rows)


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
    head = ["encoder", "new expert", "others before", "others, added", "new, added", "others, trained", "new, trained"]
    keys = ("before", "others_added", "new_added", "others_after", "new")
    rows = [
        [name, expert, *(share(row.get(key)) for key in keys)]
        for name, entry in found.items()
        for expert, row in entry.get("fifth", {}).items()
    ]
    return pipe(head, *rows) if rows else LATER


def llm(data: Any) -> str:
    """What the LLM router's own benchmark stored, but for experts that came by description."""
    head = ["model", "parameters", "variant", "data", "rows", "accuracy", *EXPERTS, "ECE", "AUROC", "accepted"]
    rows = [
        [
            str(row["model"]),
            f"{row['params'] / 1e6:.0f} M",
            str(row["variant"]),
            str(row["data"]),
            str(row["rows"]),
            *_figures(row),
            latency(row),
            f"{row['bytes'] / 1e6:.0f}",
            str(row.get("device", "-")),
        ]
        for row in measured(data, "llm")
        if knows_all(row)
    ]
    return pipe([*head, "ms, p50 / p95", "MB", "device"], *rows) if rows else LATER


def llm_settings(data: Any) -> str:
    """LLM routers that were trained without some sources, on the rows of those."""
    head = ["options", "training", "balance", "averaged", "sources left out", "rows", "accuracy", *EXPERTS]
    rows = [
        [
            "in one order" if row["settings"]["settle"] >= 1 else "in random orders",
            f"{row['settings']['steps']} x {row['settings']['batch']}",
            f"{row['settings']['balance']:g}",
            f"{row['settings'].get('average', 0):.0%}",
            ", ".join(sorted(row["per_source"])),
            str(row["rows"]),
            share(row["accuracy"]),
            *(share(row["per_domain"].get(expert)) for expert in EXPERTS),
        ]
        for row in measured(data, "llm")
        if row["data"] == "left-out"
    ]
    return pipe(head, *rows) if rows else LATER


def described(data: Any) -> str:
    """Experts that an LLM router knows by their description alone."""
    found = {(row["variant"], row["data"], row.get("device")): row for row in measured(data, "llm")}
    head = ["new expert", "data", "rows", "training", "others before", "others after", "new", "AUROC before", "after"]
    rows = []
    for (variant, kind, device), after in found.items():
        name = variant.removeprefix("added-")
        before = found.get((f"without-{name}", kind, device))
        if name == variant or before is None:
            continue
        expert = name.split("-")[0]
        others = [share for other, share in after["per_domain"].items() if other not in (expert, "other")]
        olds = [share for other, share in before["per_domain"].items() if other != "other"]
        settings = after["settings"]
        rows.append(
            [
                name,
                kind,
                str(after["rows"]),
                f"{settings['steps']} x {settings['batch']}",
                share(mean(olds)),
                share(mean(others)),
                share(after["per_domain"].get(expert)),
                share(before["auroc"]),
                share(after["auroc"]),
            ]
        )
    return pipe(head, *rows) if rows else LATER


def speed(data: Any) -> str:
    """Single queries with and without CUDA graphs, and many together."""
    found = [row for row in (data or {}).get("results", []) if "speed" in row]
    head = ["model", "device", "graphs, ms p50 / p95", "without graphs, ms p50 / p95", "64 queries together, ms each"]
    rows = [
        [
            f"{row['model']}, {row['dtype'].removeprefix('torch.')}",
            row["device"],
            *(f"{row['speed'][kind]['p50']:.1f} / {row['speed'][kind]['p95']:.1f}" for kind in ("graphs", "plain")),
            f"{row['speed']['batch']['ms_a_query']:.2f}",
        ]
        for row in found
    ]
    return pipe(head, *rows) if rows else LATER


def cascade(data: Any) -> str:
    """A cheap router, an LLM router, and both as one."""
    head = ["routers", "data", "rows", "asked the LLM", "accuracy", *EXPERTS, "ECE", "AUROC", "accepted"]
    rows = [
        [
            str(row["variant"]),
            str(row["data"]),
            str(row["rows"]),
            share(row["asked"]),
            *_figures(row),
            latency(row),
            f"{row['bytes'] / 1e6:.0f}",
        ]
        for row in measured(data, "cascade")
    ]
    return pipe([*head, "ms, p50 / p95", "MB"], *rows) if rows else LATER


def latency(row: dict[str, Any]) -> str:
    return " / ".join(f"{row['latency_ms'][key]:.1f}" for key in ("p50", "p95") if key in row["latency_ms"])


def _figures(row: dict[str, Any]) -> list[str]:
    own = (row["per_domain"].get(expert) for expert in EXPERTS)
    return [share(x) for x in (row["accuracy"], *own, row["ece"], row["auroc"], row.get("accepted_other"))]


def left_out(found: dict[str, Any]) -> str:
    """Sources of the training data that the router was trained without."""
    names = [name for name, entry in found.items() if entry.get("left_out")]
    if not names:
        return LATER
    sources = found[names[0]]["left_out"]
    rows = [
        [source, row["domain"], str(row["rows"]), *(share(found[name]["left_out"][source]["bare"]) for name in names)]
        for source, row in sources.items()
    ]
    return pipe(["source left out", "domain", "rows", *names], *rows)


def answer(found: dict[str, Any], llm_found: dict[str, Any], said: dict[str, Any]) -> str:
    """A row for each way to route: accuracy on sources it knows, and on collections of sources it does not."""
    if not said or "minilm-l6-int8" not in found:
        return LATER
    encoder = found["minilm-l6-int8"]["held_out"]
    small = [f"{encoder['cpu_ms']['p50']:.1f}", f"{encoder['bytes'] / 1e6:.0f}"]
    read = min(row["cpu_ms"]["p50"] for row in said["described"].values() if "cpu_ms" in row)
    lined_small = [f"{read:.1f}", small[1]]  # lines are compared in higher layers than the heads read
    sets = ("held out", *SETS)
    lined = {
        "five lines an expert, nothing trained": [row for name, row in said["described"].items() if "lines" in name],
        "trained on 5,469 queries": [said["trained"]["nothing"]],
        "the same, starting from the lines": [row for name, row in said["trained"].items() if name != "nothing"],
    }
    rows = [
        [
            what,
            *(share(mean(one[key]["accuracy"] for one in some) if key in some[0] else None) for key in sets),
            *(lined_small if "lines" in what else small),
        ]
        for what, some in lined.items()
    ]
    cascades = {(row["variant"], row["data"]): row for row in measured(llm_found, "cascade")}
    names = {"llm": "a chat LLM of 135 M, fine-tuned", "cascade 0.05": "trained, and the chat LLM where it is unsure"}
    for variant, what in names.items():
        if (variant, "dev") in cascades:
            held, dev = cascades[variant, "held-out"], cascades[variant, "dev"]
            ms, size = f"{held['latency_ms']['p50']:.1f}", f"{held['bytes'] / 1e6:.0f}"
            rows.append([what, share(held["accuracy"]), share(dev["accuracy"]), *["-"] * (len(SETS) - 1), ms, size])
    head = ["router", "known sources", "shift", *list(SETS.values())[1:], "ms a query, p50", "MB"]
    return f"{pipe(head, *rows)}\n\nShare of the experts' queries that reach the right one; four experts. On a CPU."


def places(found: dict[str, Any], llm_found: dict[str, Any]) -> dict[str, str]:
    """What is to stand where."""
    return {
        "encoders": encoders(found),
        "bars": bars(found),
        "left out": left_out(found),
        "many": many(found),
        "fifth": fifth(found),
        "llm": llm(llm_found),
        "llm speed": speed(llm_found),
        "llm settings": llm_settings(llm_found),
        "described": described(llm_found),
        "cascade": cascade(llm_found),
    }


SETS = {"dev": "shift", "choice": "15 sources", "final": "14 sources", "last": "9 sources"}


def by_lines(found: dict[str, Any]) -> str:
    """Without training and with it, by each set of lines and data set."""
    if not found:
        return LATER
    head = ["router", "lines", "data", "accuracy", *EXPERTS, "AUROC", "accepted", "ECE", "last layer, cosine"]
    rows = []
    for kind, part in (("untrained", found["described"]), ("trained", found.get("trained", {}))):
        for name, entry in part.items():
            for key, label in {**SETS, "held out": "held out"}.items():
                if key in entry:
                    data = entry[key]
                    shares = [share(data["per_domain"].get(expert)) for expert in EXPERTS]
                    rest = [share(data[field]) for field in ("auroc", "accepted_other", "ece")]
                    naive = share(data.get("naive"))
                    rows.append(
                        [kind, name.removeprefix("four-"), label, share(data["accuracy"]), *shares, *rest, naive]
                    )
    return pipe(head, *rows)


def tasks(found: dict[str, Any]) -> str:
    """Five lines a domain, with what public sets teach, all of their tasks or all but one."""
    if not found:
        return LATER
    head = ["learnt from", "data", "accuracy", *EXPERTS, "AUROC"]
    rows = [
        [
            kind,
            SETS[name],
            share(data["accuracy"]),
            *(share(data["per_domain"][expert]) for expert in EXPERTS),
            share(data["auroc"]),
        ]
        for kind, sets in found["figures"].items()
        for name, data in sets.items()
    ]
    meta = found["meta"]
    return f"{pipe(head, *rows)}\n\n{sum(meta['texts'].values()):,} texts. {meta['date']}, torch {meta['torch']}."


def weights(plain: Any, found: Any) -> str:
    """Four domains by lines, with the encoder's weights as they come and changed: means over the sets of lines."""
    if not plain or not found:
        return LATER
    fields = ("accuracy", "auroc", "ece")
    head = [
        "router",
        "data",
        *(f"{one}, {what}" for one in ("accuracy", "AUROC", "ECE") for what in ("plain", "changed")),
    ]
    rows = []
    for what, part, named in (("untrained", "described", "lines"), ("trained from lines", "trained", "four")):
        for key, title in {**SETS, "held out": "known sources"}.items():
            columns = []
            for field in fields:
                for data in (plain, found):
                    some = [row[key][field] for name, row in data[part].items() if named in name and key in row]
                    columns.append(share(mean(some)) if some else "")
            if columns[0]:
                rows.append([what, title, *columns])
    return pipe(head, *rows)


def task_sources(found: dict[str, Any]) -> str:
    """The public sets that tell tasks apart."""
    rows = [[row["name"], row["task"], row["repository"], row["licence"]] for row in found.get("sources", [])]
    return pipe(["set", "task", "repository", "licence"], *rows) if rows else LATER


def reread(found: dict[str, Any]) -> str:
    """The 15 sources without the rows of instruct that ask for something else."""
    parts = {
        "five lines an expert, nothing trained": [row for name, row in found["described"].items() if "lines" in name],
        "trained from the lines": [row for name, row in found.get("trained", {}).items() if name != "nothing"],
    }
    rows = []
    for what, some in parts.items():
        data = [row["choice"] for row in some if "reread" in row.get("choice", {})]
        if data:
            pairs = [(one["accuracy"], one["reread"]["accuracy"]) for one in data]
            own = [(one["per_domain"]["instruct"], one["reread"]["instruct"]) for one in data]
            rows.append([what, *(share(mean(pair[i] for pair in some)) for some in (pairs, own) for i in (0, 1))])
    head = ["router", "as labelled", "without those rows", "instruct, as labelled", "without those rows"]
    return pipe(head, *rows) if rows else LATER


def context(found: dict[str, Any]) -> str:
    """What tells a question to a database."""
    if not found:
        return LATER
    head = ["what the router sees", "sql, by lines", "others", "sql, trained from lines", "others"]
    rows = [
        [way, *(share(found[kind][way][key]) for kind in ("lines", "trained") for key in ("sql", "others"))]
        for way in found["lines"]
    ]
    counts = found["meta"]["rows"]
    return (
        f"{pipe(head, *rows)}\n\n{counts['sql']} questions to three databases and {counts['others']} queries for the "
        "other experts; share that reaches the right one, means over the three sets of lines, never abstaining."
    )


def claims(found: dict[str, Any]) -> str:
    """Routers of what experts claim."""
    if not found:
        return LATER
    names = list(next(iter(found["routers"].values())))
    heads = [f"{name}, {what}" for name in names for what in ("accuracy", "lowest domain")]
    rows = [
        [kind, *(part for name in names for part in _claimed(routers[name]))]
        for kind, routers in found["routers"].items()
    ]
    meta = found["meta"]
    return (
        f"{pipe(['trained on', *heads], *rows)}\n\n{meta['test']} queries of the toy family. "
        f"{meta['right']:.0%} of the claims that became rows are right."
    )


def _claimed(data: dict[str, Any]) -> tuple[str, str]:
    return share(data["accuracy"]), share(min(data["per_domain"][name] for name in EXPERTS))


def fifth_by_lines(found: dict[str, Any]) -> str:
    """An expert that comes by its lines to a trained router."""
    head = ["new expert", "lines", "others before", "others after", "new"]
    rows = [
        [expert, name.removeprefix("four-"), *(share(data[key]) for key in ("others_before", "others_after", "new"))]
        for name, entry in found.get("fifth", {}).items()
        for expert, data in entry.items()
    ]
    return pipe(head, *rows) if rows else LATER


def boards(found: dict[str, Any]) -> str:
    """CLINC150 and BANKING77."""
    head = ["board", "given", "accuracy", "macro-F1", "ECE", "OOS recall", "AUROC"]
    fields = ("accuracy", "macro_f1", "ece", "oos_recall", "auroc")
    rows = [
        [board.upper(), given, *(share(data.get(field)) for field in fields)]
        for board in ("clinc150", "banking77")
        for given, data in found.get(board, {}).items()
    ]
    return pipe(head, *rows) if rows else LATER


def further_boards(found: dict[str, Any]) -> str:
    """Boards that constants were chosen on: this version beside the one before."""
    versions = ("before", "now")
    if not {*versions} <= found.keys():
        return LATER
    fields = {"accuracy": "accuracy", "ece": "ECE", "auroc": "AUROC"}
    head = ["board", "routes, examples each", *(f"{name}, {one}" for name in fields.values() for one in versions)]
    where = [(board, given) for board, entry in found["now"].items() if board != "meta" for given in entry]
    columns = [[found[one][board][given].get(key) for board, given in where] for key in fields for one in versions]
    rows = [[*what, *map(share, values)] for what, values in zip(where, zip(*columns, strict=True), strict=True)]
    means = [share(mean(value for value in column if value is not None)) for column in columns]
    meta = found["now"]["meta"]
    return f"{pipe(head, *rows, ['mean', '', *means])}\n\n{meta['date']}, torch {meta['torch']}."


def main(arguments: list[str] | None = None) -> None:
    results = {"type": Path, "default": RESULTS, "help": "directory of routing.json and routing-llm.json"}
    options = arguments_of(__doc__, "results/routing.md", arguments, results=results)
    found = (stored("routing.json", options.results) or {}).get("encoders", {})
    llm_found = stored("routing-llm.json", options.results) or {}
    command = "benchmarks/routing/doc.py"
    said = stored("routing-described.json", options.results) or {}
    filled = places(found, llm_found)
    filled["answer"] = answer(found, llm_found, said)
    filled |= {"by lines": by_lines(said), "fifth by lines": fifth_by_lines(said), "boards": boards(said)}
    filled["further boards"] = further_boards(stored("routing-boards.json", options.results) or {})
    filled["reread"] = reread(said) if said else LATER
    taught = stored("routing-tasks.json", options.results) or {}
    filled |= {"tasks": tasks(taught), "task sources": task_sources(taught)}
    filled["weights"] = weights(stored("routing-described-plain.json", options.results), said)
    filled["context"] = context(stored("routing-context.json", options.results) or {})
    filled["claims"] = claims(stored("routing-claims.json", options.results) or {})
    update(options.doc, command, filled, plots(found, llm_found), check=options.check, redraw=options.redraw)


if __name__ == "__main__":
    main()

"""The plots of docs/results/routing.md: what each shows, taken from stored results, and how it is drawn."""

from typing import Any

from benchmarks.common.generated import Data, Plot, legend

KINDS = {"held_out": "held out", "dev": "shift"}


def many_data(encoders: dict[str, Any]) -> Data:
    """{encoder: [[experts, accuracy, CPU ms, MB of the heads], ...]}"""
    return {
        name: [
            [row["experts"], _short(row["accuracy"]), _short(row["cpu_ms"]), _short(row["head_bytes"] / 1e6)]
            for row in entry["many"]
        ]
        for name, entry in encoders.items()
        if entry.get("many")
    }


def measured(llm: dict[str, Any] | None, kind: str) -> list[dict[str, Any]]:
    """Results on rows; the others are what a calibration says of itself. kind: `llm` or `cascade`."""
    found = (llm or {}).get("results", [])
    return [row for row in found if "per_domain" in row and row.get("kind", "llm") == kind]


def knows_all(row: dict[str, Any]) -> bool:
    """Whether an LLM router was trained on all experts and sources."""
    return not row["variant"].startswith(("without-", "added-", "left-"))


def sizes_data(encoders: dict[str, Any], llm: dict[str, Any]) -> Data:
    """{router: [MB, ms, accuracy on shift, the weakest expert's]}"""
    found = {
        name: [entry["dev"]["bytes"] / 1e6, entry["held_out"]["cpu_ms"]["p50"], *_accuracies(entry["dev"])]
        for name, entry in encoders.items()
        if entry.get("dev") and entry.get("held_out")
    }
    for row in measured(llm, "llm"):
        if row["data"] == "dev" and knows_all(row):
            card = row.get("device", "").partition("NVIDIA ")[2]
            name = ", ".join([row["model"], row["variant"], *card.split()[:1]])
            ms = row["latency_ms"].get("p50", row["latency_ms"].get("mean", 0.0))
            found[name] = [row["bytes"] / 1e6, ms, *_accuracies(row)]
    return {name: [_short(value) for value in values] for name, values in found.items()}


def risk_data(encoders: dict[str, Any]) -> Data:
    """{rows: {encoder: [[coverage, share wrong], ...]}}"""
    found: Data = {}
    for kind, title in KINDS.items():
        for name, entry in encoders.items():
            if curve := entry.get(kind, {}).get("risk_coverage"):
                found.setdefault(title, {})[name] = [[_short(x), _short(y)] for x, y in curve]
    return found


def reliability_data(encoders: dict[str, Any]) -> Data:
    """{rows: {encoder: [[mean probability, share right, rows], ...]}}"""
    found: Data = {}
    for kind, title in KINDS.items():
        for name, entry in encoders.items():
            if bins := entry.get(kind, {}).get("reliability"):
                found.setdefault(title, {})[name] = [[_short(x), _short(y), count] for x, y, count in bins]
    return found


def _accuracies(row: dict[str, Any]) -> tuple[float, float]:
    return row["accuracy"], min(share for name, share in row["per_domain"].items() if name != "other")


def _short(value: float) -> float:
    """What a plot can show of it."""
    return float(f"{value:.4g}")


def draw_many(data: Data, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3))
    for column, (axis, label) in enumerate(zip(axes, ("accuracy", "CPU ms, p50", "heads, MB"), strict=True), start=1):
        for name, rows in data.items():
            axis.plot([row[0] for row in rows], [row[column] for row in rows], marker="o", markersize=3, label=name)
        counts = sorted({row[0] for rows in data.values() for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, map(str, counts))
        axis.set(xlabel="experts", ylabel=label)
        axis.set_ylim(0, 1.02 if label == "accuracy" else None)
    legend(figure)
    return figure


def draw_sizes(data: Data, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for column, (axis, label) in enumerate(zip(axes, ("MB in memory", "ms a query, p50"), strict=True)):
        for i, (name, row) in enumerate(data.items()):
            axis.plot(row[column], row[2], "o", color=f"C{i}", label=name)
            axis.plot(row[column], row[3], "v", color=f"C{i}", markerfacecolor="none")
        axis.set_xscale("log")
        axis.set_xlabel(label)
    axes[0].set_ylabel("accuracy under shift\n(hollow: the weakest expert's)")
    axes[0].set_ylim(0, 1.02)
    legend(figure)
    return figure


def draw_risk(data: Data, pyplot: Any) -> Any:
    return _panels(data, pyplot, "share answered, surest first", "share wrong", scatter=False)


def draw_reliability(data: Data, pyplot: Any) -> Any:
    return _panels(data, pyplot, "probability of the best expert", "share right", scatter=True)


def _panels(data: Data, pyplot: Any, across: str, up: str, *, scatter: bool) -> Any:
    figure, axes = pyplot.subplots(1, len(data), figsize=(4.5 * len(data), 3.2), sharey=True, squeeze=False)
    for axis, (title, curves) in zip(axes[0], data.items(), strict=True):
        if scatter:
            axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for name, rows in curves.items():
            x, y = [row[0] for row in rows], [row[1] for row in rows]
            if scatter:
                total = sum(row[2] for row in rows)
                axis.scatter(x, y, [10 + 200 * row[2] / total for row in rows], label=name, alpha=0.7)
            else:
                axis.plot(x, y, label=name)
        axis.set(xlabel=across, title=title)
    axes[0][0].set_ylabel(up)
    legend(figure)
    return figure


def plots(encoders: dict[str, Any], llm: dict[str, Any]) -> dict[str, Plot]:
    return {
        "many": Plot(many_data(encoders), draw_many, "Accuracy, latency and memory against the number of experts"),
        "sizes": Plot(sizes_data(encoders, llm), draw_sizes, "Accuracy under shift against memory and latency"),
        "risk": Plot(risk_data(encoders), draw_risk, "What is wrong of the surest queries"),
        "reliability": Plot(
            reliability_data(encoders), draw_reliability, "How often the best expert is right, by its probability"
        ),
    }

"""A router's figures as a Markdown page, and two plots of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from meswitch.errors import ConfigError
from meswitch.router.base import OTHER
from meswitch.router.evaluate import Evaluation

PLOTS = {
    "risk-coverage": "What is wrong of the surest queries",
    "reliability": "How often the best expert is right, by its probability",
}


def markdown(result: Evaluation, plots: Mapping[str, str] | None = None) -> str:
    """A page of tables; plots: title -> the link of an image."""
    summary = {
        "accuracy": number(result.accuracy),
        "coverage": number(result.coverage),
        "calibration error": number(result.ece),
        "AUROC of other": number(result.auroc),
        "other accepted at 95 % coverage": number(result.accepted_other),
        **{f"latency, {name}": f"{value:.1f} ms" for name, value in result.latency_ms.items()},
        "memory": "-" if result.bytes is None else f"{result.bytes / 1e6:.0f} MB",
    }
    labels = list(result.confusion)
    domains = [
        [domain, *(str(row[name]) for name in labels), number(result.per_domain.get(domain))]
        for domain, row in result.confusion.items()
    ]
    parts = [
        "# Router",
        _table(["figure", "value"], summary.items()),
        "Accuracy and calibration are over the experts' rows, whether or not the router would abstain.",
        f"## By domain\n\nWhat the router does; the column {OTHER} counts abstentions.",
        _table(["domain", *labels, "right"], domains),
        "## By source",
        _table(["source", "right"], [(source, number(share)) for source, share in result.per_source.items()]),
    ]
    if result.unlabelled:
        rows = [(domain, number(share)) for domain, share in result.unlabelled.items()]
        parts += ["## Without the label that other rows of the domain open with", _table(["domain", "right"], rows)]
    parts += ["## Risk and coverage", _table(["answered", "wrong"], [map(number, p) for p in result.risk_coverage])]
    bins = [(number(sure), number(right), str(rows)) for sure, right, rows in result.reliability]
    parts += ["## Reliability", _table(["mean probability", "right", "rows"], bins)]
    parts += [f"![{title}]({link})" for title, link in (plots or {}).items()]
    return "\n\n".join(parts) + "\n"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def draw(result: Evaluation, directory: Path) -> dict[str, Path]:
    """Write the plots as SVG files; title -> file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "--plots: plotting needs matplotlib; install it with `pip install 'meswitch[plot]'`"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "router", "svg.fonttype": "none", "font.size": 9}):
        for (name, title), paint in zip(PLOTS.items(), (_risk, _reliability), strict=True):
            figure, axis = pyplot.subplots(figsize=(4, 3), layout="constrained")
            paint(axis, result)
            files[title] = directory / f"{name}.svg"
            figure.savefig(files[title], format="svg", metadata={"Date": None})
            pyplot.close(figure)
    return files


def _risk(axis: Any, result: Evaluation) -> None:
    axis.plot([coverage for coverage, _ in result.risk_coverage], [risk for _, risk in result.risk_coverage])
    axis.set(xlabel="share answered, surest first", ylabel="share wrong", xlim=(0, 1))
    axis.set_ylim(bottom=0)


def _reliability(axis: Any, result: Evaluation) -> None:
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    total = sum(rows for _, _, rows in result.reliability) or 1
    axis.scatter(
        [sure for sure, _, _ in result.reliability],
        [right for _, right, _ in result.reliability],
        [15 + 200 * rows / total for _, _, rows in result.reliability],
    )
    axis.set(xlabel="probability of the best expert", ylabel="share right", xlim=(0, 1.02), ylim=(0, 1.02))


def _table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        escaped = (cell.replace("|", r"\|") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join([line(head), line(rule), *map(line, rows)])

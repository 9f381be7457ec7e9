"""How good a router is on labelled queries: its figures, a Markdown page of them, and two plots."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from meswitch.errors import ConfigError
from meswitch.router.base import OTHER, Router, as_messages
from meswitch.router.calibrate import auroc, calibration_error, reliability
from meswitch.router.data import Row, without_labels

_BATCH = 256
_TIMED = 100  # queries timed one at a time
PLOTS = {
    "risk-coverage": "What is wrong of the surest queries",
    "reliability": "How often the best expert is right, by its probability",
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one router on one data set.

    A row with an expert's domain is right if that expert scores best, whether or not the router would then abstain;
    an `other` row is right if the router abstains.

    Args:
        accuracy: share right of the rows with an expert's domain.
        per_domain: share right of all rows of a domain.
        per_source: share right of all rows of a source.
        confusion: domain -> {what the router does -> rows}; the column `other` counts abstentions.
        ece: expected calibration error of the best expert's probability, rows with an expert's domain.
        auroc: how well that probability tells those rows from `other` rows.
        coverage: share of the rows with an expert's domain that is answered.
        latency_ms: of a single query, mean, p50 and p95. None: the data has no rows to tell.
        risk_coverage: (coverage, share wrong of what is then answered) of the experts' rows, the surest first.
        reliability: (mean probability of the best expert, share right, rows) of bins of that probability, experts'
            rows.
        accepted_other: share of `other` rows answered at the threshold that answers 95 % of the experts' rows.
        unlabelled: in domains whose rows often open with a label ("Write a SQL query: "), share right of those that do
            not.
        bytes: of the router in memory with its encoder, None if it does not say.
    """

    accuracy: float | None
    per_domain: dict[str, float]
    per_source: dict[str, float]
    confusion: dict[str, dict[str, int]]
    ece: float | None
    auroc: float | None
    coverage: float | None
    latency_ms: dict[str, float]
    risk_coverage: list[tuple[float, float]]
    reliability: list[tuple[float, float, int]]
    accepted_other: float | None
    unlabelled: dict[str, float]
    bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_router(router: Router, rows: Sequence[Row]) -> Evaluation:
    """Score all rows in batches, then time some of them one by one."""
    scored: list[dict[str, float]] = []
    for start in range(0, len(rows), _BATCH):
        scored += router.scores([as_messages(row.query) for row in rows[start : start + _BATCH]])
    best = [max(router.experts, key=lambda name: scores[name]) for scores in scored]
    confidence = torch.tensor([scores[name] for scores, name in zip(scored, best, strict=True)], dtype=torch.float64)
    done = [OTHER if router.decide(s).reason == "abstained" else name for s, name in zip(scored, best, strict=True)]
    known = torch.tensor([row.domain != OTHER for row in rows], dtype=torch.bool)
    right = torch.tensor(
        [
            (doing if row.domain == OTHER else name) == row.domain
            for row, name, doing in zip(rows, best, done, strict=True)
        ],
        dtype=torch.bool,
    )
    answered = torch.tensor([doing != OTHER for doing in done], dtype=torch.bool)
    some = bool(known.any())
    return Evaluation(
        accuracy=float(right[known].double().mean()) if some else None,
        per_domain=_shares([row.domain for row in rows], right.tolist()),
        per_source=_shares([row.source for row in rows], right.tolist()),
        confusion=_confusion(router.experts, [row.domain for row in rows], done),
        ece=calibration_error(confidence[known], right[known]) if some else None,
        auroc=auroc(confidence[known], confidence[~known]),
        coverage=float(answered[known].double().mean()) if some else None,
        latency_ms=latency(router, rows),
        risk_coverage=risk_coverage(confidence[known], right[known]),
        reliability=reliability(confidence[known], right[known]),
        accepted_other=accepted(confidence[known], confidence[~known]),
        unlabelled=_unlabelled(rows, right.tolist()),
        bytes=router.nbytes() if hasattr(router, "nbytes") else None,
    )


def risk_coverage(confidence: torch.Tensor, right: torch.Tensor, points: int = 20) -> list[tuple[float, float]]:
    """(coverage, share wrong) of the surest rows, in `points` steps of equal coverage; confidence, right: [n]."""
    order = confidence.argsort(descending=True, stable=True)
    wrong = (~right[order]).double().cumsum(0)
    counts = sorted({max(1, round(len(order) * i / points)) for i in range(1, points + 1)}) if len(order) else []
    return [(count / len(order), float(wrong[count - 1]) / count) for count in counts]


def accepted(known: torch.Tensor, other: torch.Tensor, coverage: float = 0.95) -> float | None:
    """Share of `other` [m] at least as sure as the `coverage` surest of `known` [n]; None if either is empty."""
    if not len(known) or not len(other):
        return None
    needed = min(len(known), max(1, round(coverage * len(known))))
    return float((other >= known.sort(descending=True).values[needed - 1]).double().mean())


def _unlabelled(rows: Sequence[Row], right: list[bool]) -> dict[str, float]:
    labelled = {i for i, _ in without_labels(rows)}
    domains = {rows[i].domain for i in labelled}
    kept = [i for i, row in enumerate(rows) if row.domain in domains and i not in labelled]
    return _shares([rows[i].domain for i in kept], [right[i] for i in kept])


def _shares(keys: list[str], right: list[bool]) -> dict[str, float]:
    members: dict[str, list[bool]] = {}
    for key, value in zip(keys, right, strict=True):
        members.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in sorted(members.items())}


def _confusion(experts: Sequence[str], domains: list[str], done: list[str]) -> dict[str, dict[str, int]]:
    labels = [*experts, OTHER]
    table = {domain: dict.fromkeys(labels, 0) for domain in labels}
    for domain, doing in zip(domains, done, strict=True):
        table[domain][doing] += 1
    return table


def latency(router: Router, rows: Sequence[Row], count: int = _TIMED) -> dict[str, float]:
    """Milliseconds of about `count` of the queries, one at a time: mean, p50 and p95."""
    if not rows:
        return {}
    sample = rows[:: max(1, len(rows) // count)][:count]
    router.route(sample[0].query)  # the first call pays for lazy initialisation
    times = []
    for row in sample:
        start = time.perf_counter()
        router.route(row.query)
        times.append((time.perf_counter() - start) * 1e3)
    measured = torch.tensor(times, dtype=torch.float64)
    return {
        "mean": float(measured.mean()),
        "p50": float(measured.quantile(0.5)),
        "p95": float(measured.quantile(0.95)),
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


def draw_plots(result: Evaluation, directory: Path) -> dict[str, Path]:
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

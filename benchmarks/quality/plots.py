"""The plots of docs/results/quality.md: what each shows, taken from stored results, and how it is drawn."""

import re
from collections.abc import Mapping
from typing import Any

from benchmarks.common.generated import Data, Plot, legend
from benchmarks.quality.ablations import mean_kl
from benchmarks.quality.pairs import OURS, points
from benchmarks.quality.store import Store

COLOURS = {
    OURS: "#000000",
    "me-switch-distilled": "#17becf",
    "rtn": "#1f77b4",
    "bitdelta": "#d62728",
    "svd": "#9467bd",
    "per-axis": "#ff7f0e",
    "delta-come": "#2ca02c",
    "deltazip": "#8c564b",
    "dare": "#e377c2",
    "d-qrelo": "#17becf",
    "impart": "#bcbd22",
    "ultradelta": "#7f7f7f",
    "delta-dct": "#393b79",
}
LAYER_TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_NUMBER = re.compile(r"\d+(\.\d+)?")


def frontier_data(stores: Mapping[str, Store]) -> Data:
    """{expert: {method: [[bpw, gain], ...]}}"""
    return _curves(stores["frontier"], "gain")


def kl_data(stores: Mapping[str, Store]) -> Data:
    """{expert: {method: [[bpw, KL], ...]}}"""
    return _curves(stores["frontier"], "kl")


def _curves(store: Store, figure: str) -> Data:
    found: Data = {}
    for expert in store.experts:
        for point in points(store, expert):
            if point.job.get(figure) is not None:
                curves = found.setdefault(expert, {})
                curves.setdefault(point.setting.group, []).append([short(point.bits), short(point.job[figure])])
    return found


def layers_data(stores: Mapping[str, Store]) -> Data:
    """{expert: {setting: [[layer, error], ...]}}: root mean square over the linear layers of a block; then the head."""
    found: Data = {}
    for store in (stores["frontier"], stores["family"]):
        for expert in store.experts:
            curves: Data = {}
            if layers := store.references[expert].get("base_layers"):
                curves["no delta"] = _by_block(layers)
            for point in points(store, expert):
                if "layers" in point.job:
                    curves[f"{point.name} ({point.bits:.2f})"] = _by_block(point.job["layers"])
            if len(curves) > 1:
                found.setdefault(expert, curves)
    return found


def short(value: float) -> float:
    """What a plot can show of it."""
    return float(f"{value:.4g}")


def _by_block(layers: Mapping[str, float]) -> list[list[Any]]:
    squares: dict[str, list[float]] = {}
    for name, error in layers.items():
        number = re.search(r"\.(\d+)\.", name)
        squares.setdefault(number[1] if number else "head", []).append(error**2)
    return [[name, short((sum(some) / len(some)) ** 0.5)] for name, some in squares.items()]


def ablation_data(stores: Mapping[str, Store]) -> Data:
    """{group: [[label, geometric mean of KL], ...]} of the groups that go through numbers."""
    store, found = stores["ablations"], {}
    for group in dict.fromkeys(setting.group for setting in stores["ablations"].settings):
        settings = [setting for setting in store.settings if setting.group == group and store.found(setting)]
        curve = [
            [float(number[0]), short(mean)]
            for setting in settings
            if (number := _NUMBER.match(setting.label)) and (mean := mean_kl(store, setting, settings)) is not None
        ]
        if len(curve) > 2:
            found[group] = sorted(curve)
    return found


def draw_frontier(data: Data, pyplot: Any) -> Any:
    figure = _methods(data, pyplot, "gain retained", best=max)
    for axis in figure.axes:
        axis.set_ylim(-0.05, 1.05)
        axis.axhline(1, color="#999999", linewidth=0.6)
    return figure


def draw_kl(data: Data, pyplot: Any) -> Any:
    figure = _methods(data, pyplot, "KL, nats a token", best=min)
    for axis in figure.axes:
        axis.set_yscale("log")
        axis.set_ylim(bottom=1e-6)  # less than that is rounding
        axis.minorticks_off()
    return figure


def _methods(data: Data, pyplot: Any, label: str, best: Any) -> Any:
    """A panel for each expert, a line for each method: its best point so far, and every point as a dot."""
    figure, axes = pyplot.subplots(1, len(data), figsize=(3.2 * len(data), 3.4), sharey=True, squeeze=False)
    for axis, (expert, curves) in zip(axes[0], data.items(), strict=True):
        for method, curve in curves.items():
            sizes, values = [size for size, _ in curve], [value for _, value in curve]
            reached = [best(values[: i + 1]) for i in range(len(values))]
            style = {"color": COLOURS.get(method, "#777777"), "linewidth": 2 if method == OURS else 1}
            axis.plot(sizes, reached, label=method, zorder=3 if method == OURS else 2, **style)
            axis.plot(sizes, values, ".", color=style["color"], markersize=4)
        axis.set(title=expert, xlabel="bits per weight, whole artifact")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(label)
    legend(figure)
    return figure


def draw_layers(data: Data, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(1, len(data), figsize=(3.2 * len(data), 3.8), sharey=True, squeeze=False)
    for axis, (expert, curves) in zip(axes[0], data.items(), strict=True):
        for name, curve in curves.items():
            method = name.partition(",")[0]
            ours = {"linestyle": "-" if method == OURS else "--", "marker": "." if method == OURS else ""}
            axis.plot([block for block, _ in curve], [error for _, error in curve], label=name, linewidth=1, **ours)
        axis.set(title=expert, xlabel="block, then head", yscale="log")
        axis.set_yticks(LAYER_TICKS, [f"{tick:g}" for tick in LAYER_TICKS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("relative output error")
    legend(figure)
    return figure


def draw_ablations(data: Data, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(1, len(data), figsize=(2.6 * len(data), 2.8), sharey=True, squeeze=False)
    for axis, (group, curve) in zip(axes[0], data.items(), strict=True):
        axis.plot([x for x, _ in curve], [y for _, y in curve], ".-", color="#000000")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_yscale("log")
        axis.set_title(group, fontsize=9)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("KL, nats a token")
    figure.tight_layout()
    return figure


def plots(stores: Mapping[str, Store]) -> dict[str, Plot]:
    """By name."""
    return {
        "frontier": Plot(frontier_data(stores), draw_frontier, "Gain retained against bits per weight"),
        "kl": Plot(kl_data(stores), draw_kl, "KL from the full expert against bits per weight"),
        "layers": Plot(layers_data(stores), draw_layers, "Relative output error by layer"),
        "ablations": Plot(ablation_data(stores), draw_ablations, "KL against what an ablation changes"),
    }

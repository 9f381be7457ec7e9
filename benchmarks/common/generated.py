"""Pages made from stored results: places filled, plots drawn, and whether a page says what the results say.

A plot's data are plain JSON; their digest is in the SVG, so that whether it is up to date can be told without drawing.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.markdown_tables import fill, has_place

Data = dict[str, Any]
ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results"


class Plot(NamedTuple):
    """data: what it shows; empty, and there is none. draw: from data and pyplot, a figure."""

    data: Data
    draw: Callable[[Data, Any], Any]
    title: str


def where_measured(meta: Data) -> str:
    """A line under a table: the card, the versions of what was there, the day."""
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if version)
    return f"{meta['card']}, {versions}, {meta['date'][:10]}."


def arguments_of(description: str | None, page: str, arguments: list[str] | None, **more: Any) -> argparse.Namespace:
    """Command line of a script that makes a page. more: further options, by name, as `add_argument` takes them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say what is out of date, and exit 1")
    parser.add_argument("--redraw", action="store_true", help="draw all plots, not only those whose data changed")
    parser.add_argument("--doc", type=Path, default=ROOT / "docs" / page)
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args(arguments)


def update(
    page: Path, command: str, places: Mapping[str, str], plots: Mapping[str, Plot], *, check: bool, redraw: bool
) -> None:
    """Fill a page's places and draw its plots, which lie in a directory named like it; or only compare.

    Args:
        command: what makes the page, for the message. plots: `plot NAME` is the place of each.

    Raises:
        SystemExit: a place is missing; or, with `check`, the page or a plot is older than the results.
    """
    directory = page.parent / page.stem
    files = {name: directory / f"{name}.svg" for name in plots}
    shown = {
        f"plot {name}": f"![{plot.title}]({page.stem}/{name}.svg)" if plot.data else "Not measured yet."
        for name, plot in plots.items()
    }
    old = new = page.read_text()
    for name, content in {**places, **shown}.items():
        if not has_place(new, name):
            raise SystemExit(f"<!-- {name} -->: no such place in the document")
        new = fill(new, name, content)
    stale = [name for name, plot in plots.items() if _is_stale(plot.data, files[name])]
    if check:
        if new != old or stale:
            what = [page.name] * (new != old) + [f"{page.stem}/{name}.svg" for name in stale]
            sys.exit(f"{', '.join(what)}: older than the results: run `python {command}`")
        return
    for name in plots if redraw else stale:
        _draw(name, plots[name], files[name])
    page.write_text(new)


def digest(data: Data) -> str:
    return f"data sha256 {hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()}"


def _is_stale(data: Data, file: Path) -> bool:
    """Whether the file shows other data, is missing, or must go."""
    drawn = file.read_text() if file.exists() else ""
    return digest(data) not in drawn if data else bool(drawn)


def _draw(name: str, plot: Plot, file: Path) -> None:
    """Draw a plot; the same data give the same bytes."""
    if not plot.data:
        file.unlink(missing_ok=True)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        figure = plot.draw(plot.data, pyplot)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None, "Description": digest(plot.data)})
        pyplot.close(figure)
    # matplotlib leaves blanks at the ends of lines, which a repository does not want
    file.write_text("".join(f"{line.rstrip()}\n" for line in file.read_text().splitlines()))


def legend(figure: Any) -> None:
    """One legend for all panels, below them, with what any of them shows."""
    shown = [panel.get_legend_handles_labels() for panel in figure.axes]
    by_label = {label: handle for handles, labels in shown for handle, label in zip(handles, labels, strict=True)}
    handles, labels = list(by_label.values()), list(by_label)
    rows = -(-len(labels) // 4)
    figure.tight_layout(rect=(0, 0.07 * rows, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncol=min(4, len(labels)), fontsize=8, frameon=False)


def stored(name: str, results: Path = RESULTS) -> Data | None:
    """A result file, if it is there."""
    file = results / name
    found: Data | None = json.loads(file.read_text()) if file.exists() else None
    return found

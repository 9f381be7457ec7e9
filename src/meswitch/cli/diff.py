"""`meswitch diff`: what a fine-tune changed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.cli import console
from meswitch.cli.plan import statements, support
from meswitch.errors import ConfigError
from meswitch.units import plural

if TYPE_CHECKING:
    from meswitch.compression.diff import Diff, FieldChange, WeightChange
    from meswitch.configuration import FieldDifference

_TOKENS_SHOWN = 12
# The order in which a token meets them; what is not named comes between these and the head.
_ORDER = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TEMPLATES = {
    "same": "the same",
    "differs": "differs: the expert's own is used",
    "added": "only the expert has one",
    "removed": "only the base has one",
    "none": "neither has one",
}


def diff_command(
    base: Annotated[str, typer.Option(metavar="DIR|HUB_ID", help="The base checkpoint.")],
    expert: Annotated[str, typer.Option(metavar="DIR|HUB_ID", help="A full fine-tune of it.")],
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also plot the relative norm by layer and projection. Needs `meswitch[plot]`."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, every tensor included, instead of tables.")
    ] = False,
) -> None:
    """Show what a fine-tune changed: weights, configuration, tokenizer.

    Weights: the size of the change relative to the base (norms of the delta and of the base), how many weights are
    exactly equal, the largest change, and the excess kurtosis of the delta (0 is a bell curve; a delta with heavy
    tails needs salient channels or smaller groups). Then what else differs, and whether the two can share a base.

    Example:

        meswitch diff --base B --expert B-math --png math.png
    """
    if png is not None:
        _pyplot()  # a missing package should not cost minutes of reading
    console.quiet()
    from meswitch.checkpoint import Checkpoint
    from meswitch.compression.diff import diff as run

    architecture = support(Checkpoint.open(base).config)
    with console.progress("diff") as progress:
        found = run(base, expert, progress=progress)
    if png is not None:
        plot(found, png)
        console.note(f"wrote {png}")
    if as_json:
        console.print_json(diff_json(found) | {"architecture": architecture})
    else:
        _show(found, statements(architecture))


def diff_json(found: "Diff") -> dict[str, Any]:
    """The whole comparison, with relative norms and shares worked out."""

    def plain(change: "WeightChange") -> dict[str, Any]:
        shares = {"relative_norm": change.relative_norm, "unchanged_share": change.unchanged_share}
        return dataclasses.asdict(change) | shares

    config = [dataclasses.asdict(item) | {"changes_computation": item.changes_computation} for item in found.config]
    tensors = [
        {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if f.name != "change"} | plain(item.change)
        for item in found.tensors
    ]
    return dataclasses.asdict(found) | {
        "total": plain(found.total),
        "by_type": {name: plain(change) for name, change in found.by_type().items()},
        "tensors": tensors,
        "config": config,
    }


def _show(found: "Diff", architecture: dict[str, str]) -> None:
    types = console.table(
        f"{found.expert} against {found.base}",
        "layer type", "weights", "change", "equal", "largest", "excess kurtosis",
    )  # fmt: skip
    for name, change in sorted(found.by_type().items(), key=lambda item: _rank(item[0])):
        types.add_row(name, *_cells(change))
    types.add_row("all", *_cells(found.total), style="bold")
    console.show(
        types,
        *([_layers(found)] if found.by_layer() else []),
        console.pairs("", _facts(found) | architecture),
    )


def _cells(change: "WeightChange") -> list[str]:
    tails = "-" if change.kurtosis is None else f"{change.kurtosis:.2f}"
    broken = f" ({change.not_finite} not finite)" if change.not_finite else ""
    equal = f"{change.unchanged_share:.2%}"
    return [f"{change.weights:,}", _percent(change.relative_norm) + broken, equal, f"{change.largest:.3g}", tails]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _rank(kind: str) -> int:
    last = kind.rpartition(".")[2]
    return _ORDER.index(last) if last in _ORDER else len(_ORDER) + (last == "lm_head")


def _grid(found: "Diff") -> tuple[list[int], list[str], dict[tuple[int, str], float | None]]:
    """Layers, layer types in the blocks, and the relative norm of each pair."""
    cells = {key: change.relative_norm for key, change in found.by_layer().items()}
    return sorted({layer for layer, _ in cells}), sorted(dict.fromkeys(kind for _, kind in cells), key=_rank), cells


def _short(kinds: list[str]) -> list[str]:
    """`self_attn.q_proj` -> `q`, `self_attn.q_proj.bias` -> `q bias`; whole names where two would read the same."""
    norms = {"input_layernorm": "input norm", "post_attention_layernorm": "post norm"}
    short = []
    for kind in kinds:
        *_, name = kind.removesuffix(".bias").split(".")
        short.append(norms.get(name, name.removesuffix("_proj")) + (" bias" if kind.endswith(".bias") else ""))
    return [name if short.count(name) == 1 else kind for name, kind in zip(short, kinds, strict=True)]


def _layers(found: "Diff") -> Any:
    layers, kinds, cells = _grid(found)
    made = console.table("change by layer", "layer", *_short(kinds))
    for layer in layers:
        made.add_row(str(layer), *(_percent(cells.get((layer, kind))) for kind in kinds))
    return made


def _facts(found: "Diff") -> dict[str, str]:
    facts = {"can share the base": "yes" if found.obstacle is None else f"no: {found.obstacle}"}
    for item in found.tensors:
        if item.rows:
            added = f", {item.added_rows:+d} rows" if item.added_rows else ""
            facts[item.type] = f"{item.unchanged_rows} of {item.rows} rows exactly equal{added}"
    for label, names in (("only in the base", found.only_base), ("only in the expert", found.only_expert)):
        if names:
            facts[label] = ", ".join(names)
    if found.other_shape:
        shapes = (f"{name} {list(a)} -> {list(b)}" for name, (a, b) in found.other_shape.items())
        facts["other shape"] = "\n".join(shapes)
    if found.hints:
        facts["hint"] = "\n".join(found.hints)
    facts["config.json"] = _fields(found.config)
    facts["generation_config.json"] = _fields(found.generation)
    tokens = found.tokenizer
    if tokens is None:
        return facts | {"tokenizer": "not compared: one of the two has none that can be read here"}
    moved = [f"{plural(tokens.moved, 'token')} with another id"] if tokens.moved else []
    named = [_tokens("added", tokens.added), _tokens("removed", tokens.removed)]
    facts["tokenizer"] = "\n".join([*filter(None, named), *moved]) or "the same tokens"
    facts["special tokens"] = _fields(tokens.special)
    facts["chat template"] = _TEMPLATES[tokens.chat_template]
    return facts


def _tokens(label: str, tokens: tuple[tuple[int, str], ...]) -> str:
    if not tokens:
        return ""
    more = f" and {len(tokens) - _TOKENS_SHOWN} more" if len(tokens) > _TOKENS_SHOWN else ""
    return f"{label}: " + ", ".join(f"{text!r} ({number})" for number, text in tokens[:_TOKENS_SHOWN]) + more


def _fields(changes: "Sequence[FieldChange | FieldDifference]") -> str:
    lines = (f"{item.field}: {item.base!r} -> {item.expert!r}{_effect(item)}" for item in changes)
    return "\n".join(lines) or "the same"


def _effect(change: "FieldChange | FieldDifference") -> str:
    reason = getattr(change, "reason", "")
    return " (changes the computation)" if reason is None else f" ({reason})" if reason else ""


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--png: plotting needs matplotlib; install it with `pip install 'meswitch[plot]'`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(found: "Diff", file: Path) -> None:
    """A heatmap of the relative norms: layers across, projections down, the rest in a line below the title."""
    pyplot = _pyplot()
    layers, kinds, cells = _grid(found)
    if not layers:
        raise ConfigError(f"--png: {found.expert} has no numbered layers to plot")
    values = [[cells.get((layer, kind)) for layer in layers] for kind in kinds]
    top = max((value for row in values for value in row if value is not None), default=0.0)
    digits = 1 if top >= 0.1 else 2
    width, height = max(6.0, 2.6 + 0.5 * len(layers)), 1.9 + 0.42 * len(kinds)
    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    percents = [[float("nan") if value is None else value * 100 for value in row] for row in values]
    image = axes.imshow(percents, aspect="auto", cmap="Blues", vmin=0, vmax=top * 100 or 1)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), _short(kinds))
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                color = "white" if value > 0.6 * top else "#222222"
                axes.text(x, y, f"{value * 100:.{digits}f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, label="norm of the change, % of the base's", pad=0.02).outline.set_visible(False)
    outside = sorted((item for item in found.tensors if item.layer is None), key=lambda item: _rank(item.type))
    shares = ", ".join(f"{item.type} {_percent(item.change.relative_norm)}" for item in outside)
    names = f"{Path(found.expert).name} against {Path(found.base).name}"
    figure.suptitle(f"What the fine-tune changed: {names}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes.set_title(f"outside the layers: {shares or 'nothing'}", loc="left", fontsize=9, color="#555555")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)

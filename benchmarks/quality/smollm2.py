"""The section of docs/results/quality.md on SmolLM2, made from what `examples/smollm2/run.py` stored."""

from typing import Any

from benchmarks.common.generated import Data, Plot, where_measured
from benchmarks.common.markdown_tables import folded, pipe
from benchmarks.quality.plots import draw_kl, short

COMMAND = "python examples/smollm2/run.py --data DIR --work DIR --out benchmarks/results/smollm2.json"
MISSING = f"Not measured yet: `{COMMAND}`."
OURS = "me-switch"
ENDS = ("base", "full")
Row = dict[str, Any]
Training = tuple[str | None, float | None, float | None]


def places(data: Data | None) -> dict[str, str]:
    """What is to stand where."""
    return {
        "answer": answer(data) if data else MISSING,
        "smollm2": ours(data) if data else MISSING,
        "smollm2 peers": peers(data) if data else MISSING,
    }


def plots(data: Data | None) -> dict[str, Plot]:
    """By name."""
    return {"smollm2": Plot(curves(data) if data else {}, draw_kl, "SmolLM2: KL from the full expert, bits per weight")}


def answer(data: Data) -> str:
    """A row for each budget: what is left of each expert at the default settings."""
    mine = [row for row in data["rows"] if row["method"] == OURS]
    experts = list(dict.fromkeys(row["expert"] for row in mine))
    checked = [name for name in experts if any(has_gain(row) for row in mine if row["expert"] == name)]
    table = []
    for budget in budgets(data):
        found = {row["expert"]: row for row in mine if row["budget"] == budget}
        gains = [gain(found[name]) if name in found else "-" for name in checked]
        divergences = [divergence(found[name]["kl"]) if name in found else "-" for name in experts]
        table.append([f"{budget:.1f}", *gains, *divergences])
    head = [
        "budget, bits a weight",
        *(f"gain retained: {name}" for name in checked),
        *(f"KL: {name}" for name in experts),
    ]
    ends = [
        f"{name} {' and '.join(shares([row[which] for row in mine if row['expert'] == name]) for which in ENDS)}"
        for name in checked
    ]
    parts = [f"Right answers of base and full fine-tune: {'; '.join(ends)}."] if ends else []
    return "\n\n".join([pipe(head, *table), *parts, *trainings(data), note(data)])


def trainings(data: Data) -> list[str]:
    """What a reader must know before rows of an expert are set beside each other."""
    several = [name for name in dict.fromkeys(row["expert"] for row in data["rows"]) if len(trained_as(data, name)) > 1]
    lines = []
    if several:
        lines.append(
            f"The rows of {', '.join(several)} are of several trainings of the expert, each with its own base and full "
            "figures."
        )
    blocks = [row for row in data["rows"] if row["method"] == OURS and row.get("scope") == "block"]
    if blocks:
        named = ", ".join(f"{row['expert']} at {row['budget']:.1f}" for row in blocks)
        lines.append(f"Trained block by block, where end to end is the default for this size: {named}.")
    return lines


def trained_as(data: Data, expert: str) -> set[Training]:
    """The trainings that an expert's rows are of."""
    return {training_of(row) for row in data["rows"] if row["expert"] == expert}


def training_of(row: Row) -> Training:
    """What tells trainings of an expert apart: when one ended, and its figures where that is not known."""
    return row.get("training"), row["base"], row["full"]


def ours(data: Data) -> str:
    """The default settings: each budget and expert."""
    head = ["budget", "expert", "bpw", "base", "full", "compressed", "gain retained", "lost/won", "KL", "KL, merged"]
    rows = [
        [
            f"{row['budget']:.1f}",
            row["expert"],
            f"{row['bpw']:.2f}",
            *(percent(row[name]) for name in ("base", "full", "accuracy")),
            gain(row),
            "-" if row["p"] is None else f"{row['lost']}/{row['won']}, p = {row['p']:.1g}",
            divergence(row["kl"]),
            divergence(row["kl_merged"]),
            f"{row['seconds']:.0f}",
        ]
        for budget in budgets(data)
        for row in data["rows"]
        if row["method"] == OURS and row["budget"] == budget
    ]
    table = pipe([*head, "s to compress"], *rows)
    return folded("Right answers, sizes and seconds of each", table) if rows else MISSING


def note(data: Data) -> str:
    """What was asked, what was compressed, and where."""
    meta = data["meta"]
    asked = {row["expert"]: row["n"] for row in data["rows"] if row["n"]}
    counts = ", ".join(f"{count} of {expert}" for expert, count in asked.items())
    moved = ", ".join(
        f"{expert} {about['training']['relative_norm']:.1%} (KL of the base {about['base_kl']:.2g})"
        for expert, about in meta["experts"].items()
    )
    lines = [
        f"Questions: {counts or 'none'}; KL in nats a token on the answers of at most {meta['kl_questions']} questions "
        f"an expert. Fine-tuning moved the block projections by {moved}. {where_measured(meta)}"
    ]
    lines += [
        f"Served by the embedded engine in float32, {one['equal']} of {one['questions']} answers of {one['expert']} "
        "are those of the merged model."
        for one in meta["served"]
    ]
    return "\n\n".join(lines)


def peers(data: Data) -> str:
    """A sentence on who is ahead, then every method at each budget."""
    experts = list(dict.fromkeys(row["expert"] for row in data["rows"]))
    parts = []
    for budget in budgets(data):
        found: dict[str, dict[str, Row]] = {}
        for row in at(data, budget):
            found.setdefault(row["method"], {})[row["expert"]] = row
        checked = [expert for expert in experts if any(has_gain(rows.get(expert)) for rows in found.values())]
        head = ["method", "bpw", *(f"gain: {name}" for name in checked), *(f"KL: {name}" for name in experts)]
        table = [
            [
                method,
                between([row["bpw"] for row in rows.values()], 2),
                *(gain(rows[name]) if name in rows else "-" for name in checked),
                *(divergence(rows[name]["kl"]) if name in rows else "-" for name in experts),
                between([row["seconds"] for row in rows.values()], 0),
            ]
            for method, rows in found.items()
        ]
        parts.append(f"**{budget:.1f} bits a weight**\n\n{pipe([*head, 's to compress'], *table)}")
    return f"{ahead(data)}\n\n{folded('Every method at each budget', *parts)}"


def ahead(data: Data) -> str:
    """Where a peer is nearer to the full expert than ours, by name: at our budget, and with fewer bytes than ours.

    Only artifacts of the same training of an expert are compared.
    """
    place = {id(row): budget for budget in budgets(data) for row in at(data, budget)}
    beside = [
        (mine, row)
        for mine in data["rows"]
        if mine["method"] == OURS
        for row in data["rows"]
        if row["expert"] == mine["expert"] and not row["method"].startswith(OURS)
    ]
    same = [(mine, row) for mine, row in beside if training_of(row) == training_of(mine)]
    pairs = [(mine, row) for mine, row in same if place[id(row)] == mine["budget"]]
    apart = sum(place[id(row)] == mine["budget"] for mine, row in beside) - len(pairs)
    if not beside:
        return "No other method is measured yet."
    nearer = [where(mine, row) for mine, row in pairs if row["kl"] < mine["kl"]]
    count = f"{len(pairs) - len(nearer)} of {len(pairs)}"
    sentence = f"Ours has the lower KL in {count} comparisons with a peer at its budget"
    lines = [f"{sentence}; not against {', '.join(nearer)}." if nearer else f"{sentence}."]
    smaller = [
        f"{row['method']} at {size(row)} on {row['expert']}, ours at {size(mine)}"
        for mine, row in same
        if place[id(row)] != mine["budget"] and row["bpw"] < mine["bpw"] and row["kl"] < mine["kl"]
    ]
    if smaller:
        lines.append(f"With fewer bytes than ours a peer has the lower KL: {'; '.join(smaller)}.")
    checked = [(mine, row) for mine, row in pairs if has_gain(mine) and has_gain(row)]
    above = [where(mine, row) for mine, row in checked if row["gain_low"] > mine["gain_high"]]
    if above:
        lines.append(f"A peer's gain is above ours beyond both intervals: {', '.join(above)}.")
    elif checked:
        lines.append("No peer's gain at our budget is above ours beyond both intervals.")
    if apart:
        lines.append(f"Not counted, as ours is of another training of the expert: {apart}.")
    return " ".join(lines)


def where(mine: Row, row: Row) -> str:
    return f"{row['method']} on {row['expert']} at {mine['budget']:.1f}"


def size(row: Row) -> str:
    return f"{row['bpw']:.2f} bits a weight ({divergence(row['kl'])})"


def budgets(data: Data) -> list[float]:
    """Largest first."""
    return sorted({row["budget"] for row in data["rows"] if row["budget"] is not None}, reverse=True)


def at(data: Data, budget: float) -> list[Row]:
    """The rows of a budget; a method without a choice is where its size is nearest."""
    known = budgets(data)

    def place(row: Row) -> float:
        nearest = min(known, key=lambda one: abs(one - row["bpw"]))
        return nearest if row["budget"] is None else row["budget"]

    return [row for row in data["rows"] if place(row) == budget]


def curves(data: Data) -> Data:
    """{expert: {method: [[bpw, KL], ...]}}, smallest first."""
    found: Data = {}
    for row in sorted(data["rows"], key=lambda row: row["bpw"]):
        curve = found.setdefault(row["expert"], {}).setdefault(row["method"], [])
        curve.append([short(row["bpw"]), short(row["kl"])])
    order = list(dict.fromkeys(row["method"] for row in data["rows"]))
    return {expert: dict(sorted(by.items(), key=lambda item: order.index(item[0]))) for expert, by in found.items()}


def has_gain(row: Row | None) -> bool:
    return row is not None and row["gain"] is not None


def shares(values: list[float]) -> str:
    """`12.0%`, or `11.6% to 12.0%` where they differ."""
    return " to ".join(dict.fromkeys(percent(end(values)) for end in (min, max)))


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def gain(row: Row) -> str:
    """`97.0% [95.9%, 98.1%]`"""
    if row["gain"] is None:
        return "-"
    return f"{row['gain']:.1%} [{row['gain_low']:.1%}, {row['gain_high']:.1%}]"


def divergence(value: float) -> str:
    return f"{value:.3g}"


def between(values: list[float], digits: int) -> str:
    """`1.02 to 1.05`; one number where both are the same."""
    ends = [f"{end(values):.{digits}f}" for end in (min, max)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)

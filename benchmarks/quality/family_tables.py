"""The bars, the frontier and the paired comparisons of docs/results/quality.md, made from stored results."""

import math

from benchmarks.common.markdown_tables import folded, pipe
from benchmarks.quality.cells import bits, caption, kl, missing, references, retained, versus
from benchmarks.quality.pairs import CHANCE, LEAST, MOST, Pair, Point, against_best, against_each
from benchmarks.quality.store import Store
from meswitch.evaluate import compare


def family(store: Store) -> str:
    """The bars: what was asked for and what is reached."""
    head = ["budget", "expert", "bpw", "base", "full", "compressed", "gain retained", "bar", "reached"]
    head += ["lost/gained", "KL", "top-1"]
    rows, missed, asked = [], [], 0
    for setting in store.settings:
        unknown = [name for name in store.bars.get(setting.label, {}) if name not in store.found(setting)]
        missed += [f"{name} at {setting.label} (not measured)" for name in unknown]
        asked += len(unknown)
        for expert, job in store.found(setting).items():
            bar = store.bars.get(setting.label, {}).get(expert)
            reached = "-"
            if bar is not None:
                asked += 1
                within = job["bits_per_weight"] <= setting.keywords.get("target_bpw", math.inf)
                reached = "yes" if within and (job["gain"] or 0) >= bar else "**no**"
                if reached != "yes":
                    missed.append(f"{expert} at {setting.label} ({job['gain'] or 0:.1%} of {bar:.1%})")
            counts = [str(one["correct"]) if one else "-" for one in references(store, expert)]
            counts.append(str(job.get("correct", "-")))
            full = store.score(job.get("outcomes") and store.references[expert]["expert"]["outcomes"], expert)
            ours = store.score(job.get("outcomes"), expert)
            lost = versus(compare(full, ours)) if full and ours else "-"
            fidelity = [kl(job["kl"]), f"{job['top1']:.4f}"]
            bar_cell = "-" if bar is None else f"{bar:.1%}"
            rows.append([setting.label, expert, bits(job), *counts, retained(job), bar_cell, reached, lost, *fidelity])
    if not rows:
        return missing("family")
    sentence = f"{asked - len(missed)} of {asked} bars are reached"
    sentence += f"; not {', '.join(missed)}." if missed else "."
    return f"{sentence}\n\n{folded('Every budget and expert', pipe(head, *rows), caption(store))}"


def frontier(store: Store) -> str:
    """Every setting of every method."""
    checked = [expert for expert in store.experts if references(store, expert)[0]]
    head = ["method", "setting", "bpw", *(f"gain: {name}" for name in checked)]
    head += [f"KL: {name}" for name in store.experts]
    rows = []
    for setting in store.settings:
        if found := store.found(setting):
            gains = [retained(found[name]) if name in found else "-" for name in checked]
            divergences = [kl(found[name]["kl"]) if name in found else "-" for name in store.experts]
            rows.append([setting.group, setting.label, bits(*found.values()), *gains, *divergences])
    return folded("Every setting of every method", pipe(head, *rows), caption(store)) if rows else missing("frontier")


def pairs(store: Store) -> str:
    """The default against the best baseline, and in a sentence against each."""
    each = list(against_each(store))
    if not each:
        return missing("frontier")
    return "\n\n".join([_ahead(each), *_exceptions(each), _best(store)])


def _ahead(each: list[Pair]) -> str:
    budgets = len({pair.ours.setting.label for pair in each})
    experts = len({pair.ours.expert for pair in each})
    methods = len({pair.theirs.setting.group for pair in each})
    tested = [pair.right for pair in each if pair.right is not None]
    more = sum(test.lost > test.gained for test in tested)
    same = sum(test.lost == test.gained for test in tested)
    fewer = len(tested) - more - same
    worse = sum("right answers" in pair.behind for pair in each)
    lower = sum(pair.kl_lead >= 0 for pair in each)
    farther = sum("KL" in pair.behind for pair in each)
    return (
        f"{budgets} sizes of ours between {LEAST:g} and {MOST:g} bpw on {experts} experts against the best point of at "
        f"most as many bytes of each of {methods} methods: ours has more right answers in {more} of {len(tested)} "
        f"comparisons, as many in {same} and fewer in {fewer}, {worse} of them beyond chance (p < {CHANCE:g}); its KL "
        f"is no higher in {lower} of {len(each)}, and higher beyond chance in {farther}."
    )


def _exceptions(each: list[Pair]) -> list[str]:
    behind = [pair for pair in each if pair.behind]
    if not behind:
        return []
    lines = [
        f"- {pair.ours.expert}, {pair.ours.setting.label} ({pair.ours.bits:.2f} bpw): {pair.theirs.name} "
        f"({pair.theirs.bits:.2f} bpw) has better {' and '.join(pair.behind)}: {_told(pair)}"
        for pair in behind
    ]
    return ["Where a baseline is ahead beyond chance:\n\n" + "\n".join(lines)]


def _told(pair: Pair) -> str:
    right = (
        f"{_right(pair.theirs)} right against {_right(pair.ours)}, p = {pair.right.p_value:.1g}; " if pair.right else ""
    )
    return f"{right}KL {kl(pair.theirs.job['kl'])} against {kl(pair.ours.job['kl'])}, p = {pair.kl.p_value:.1g}"


def _best(store: Store) -> str:
    head = ["ours", "bpw", "expert", "right", "KL"]
    head += ["best baseline of at most these bytes", "right", "only ours/only it", "KL", "nearer: ours/it"]
    head += ["baseline of the next more bytes", "right", "only ours/only it", "KL", "nearer: ours/it"]
    rows = []
    for ours, best, above in against_best(store):
        cells = [ours.setting.label, bits(ours.job), ours.expert, _right(ours), kl(ours.job["kl"])]
        rows.append(cells + _against(best) + _against(above))
    note = "p: McNemar's exact test of the questions, sign test of the texts; not corrected for their number."
    return folded("Each size of ours beside the best baseline", pipe(head, *rows), f"{note} {caption(store)}")


def _against(pair: Pair | None) -> list[str]:
    if pair is None:
        return ["-"] * 5
    theirs = pair.theirs
    name = f"{theirs.name} ({theirs.bits:.2f} bpw)"
    right = versus(pair.right) if pair.right else "-"
    return [name, _right(theirs), right, kl(theirs.job["kl"]), versus(pair.kl)]


def _right(point: Point) -> str:
    return str(point.job.get("correct", "-"))

"""The ablations of docs/results/quality.md: a table for each group, and what it says in a sentence."""

import math
import statistics

from benchmarks.common.markdown_tables import folded, pipe
from benchmarks.quality.cells import bits, caption, kl, missing, references, retained, versus
from benchmarks.quality.pairs import CHANCE, nearer
from benchmarks.quality.settings import Setting
from benchmarks.quality.store import Store
from meswitch.evaluate import Comparison, Score, compare


def ablations(store: Store) -> str:
    """A table and its conclusion for every group."""
    parts = []
    for group in dict.fromkeys(setting.group for setting in store.settings):
        settings = [setting for setting in store.settings if setting.group == group and store.found(setting)]
        if settings:
            parts.append(f"### {group[0].upper()}{group[1:]}\n\n{_ablation(store, settings)}")
    return "\n\n".join([*parts, caption(store)]) if parts else missing("ablations")


def _ablation(store: Store, settings: list[Setting]) -> str:
    experts = store.experts
    checked = [expert for expert in experts if references(store, expert)[0]]
    reference = next((one for one in settings if "default" in one.label), settings[0])
    name = "the default" if "default" in reference.label else reference.label
    head = ["", "bpw", *(f"gain: {one}" for one in checked), *(f"KL: {one}" for one in experts)]
    head += [f"right: only {name}/only this", f"nearer: {name}/this"]
    rows = []
    for setting in settings:
        found = store.found(setting)
        gains = [retained(found[one]) if one in found else "-" for one in checked]
        divergences = [kl(found[one]["kl"]) if one in found else "-" for one in experts]
        tests = (None, None) if setting is reference else pooled(store, reference, setting)
        pairs = [versus(test) if test else "-" for test in tests]
        rows.append([setting.label, bits(*found.values()), *gains, *divergences, *pairs])
    table = pipe(head, *rows)
    if len(settings) == 1:
        return table
    return f"{conclusion(store, settings, reference)}\n\n{folded('Table', table)}"


def conclusion(store: Store, settings: list[Setting], reference: Setting) -> str:
    """What a table says, in a sentence: who has, beyond chance, more or fewer right answers, lower or higher KL."""
    right: dict[bool, list[str]] = {True: [], False: []}
    near: dict[bool, list[str]] = {True: [], False: []}
    for setting in settings:
        if setting is reference:
            continue
        answers, texts = pooled(store, reference, setting)
        if answers is not None and _beyond_chance(answers):
            lead = answers.gained - answers.lost
            right[lead > 0].append(f"{setting.label} ({lead:+d}, p = {answers.p_value:.1g})")
        means = [mean_kl(store, one, [reference, setting]) for one in (reference, setting)]
        if texts is not None and means[0] and means[1] and _beyond_chance(texts):
            lower = means[1] < means[0]
            if lower == (texts.gained > texts.lost):  # nearer on more texts and on the whole
                near[lower].append(f"{setting.label} (x{means[1] / means[0]:.2f})")
    name = reference.label
    told = [
        _verdict(f"Right answers against {name}", right, "more with", "fewer with"),
        _verdict("KL", near, "lower with", "higher with"),
    ]
    return "; ".join(told) + "."


def _verdict(what: str, found: dict[bool, list[str]], good: str, bad: str) -> str:
    parts = [f"{words} {', '.join(found[side])}" for side, words in ((True, good), (False, bad)) if found[side]]
    return f"{what}: {', '.join(parts)}" if parts else f"{what}: no difference beyond chance"


def _beyond_chance(test: Comparison) -> bool:
    return test.p_value < CHANCE and test.lost != test.gained


def pooled(store: Store, first: Setting, second: Setting) -> tuple[Comparison | None, Comparison | None]:
    """Paired comparisons of right answers and of KL over the questions and texts of all experts that both have."""
    ours, theirs = store.found(first), store.found(second)
    both = [name for name in store.experts if name in ours and name in theirs]
    outcomes = ["".join(found[name].get("outcomes", "") for name in both) for found in (ours, theirs)]
    texts = [[one for name in both for one in found[name]["kl_by_text"]] for found in (ours, theirs)]
    scores = [Score("all", store.meta["seed"], tuple(one == "1" for one in text)) for text in outcomes]
    return compare(*scores) if outcomes[0] else None, nearer(*texts) if both else None


def mean_kl(store: Store, setting: Setting, settings: list[Setting]) -> float | None:
    """Geometric mean over the experts that any of the settings was measured on; None if one of them is missing."""
    wanted = {name for one in settings for name in store.found(one)}
    found = store.found(setting)
    if set(found) != wanted or not wanted:
        return None
    return math.exp(statistics.fmean(math.log(max(job["kl"], 1e-12)) for job in found.values()))

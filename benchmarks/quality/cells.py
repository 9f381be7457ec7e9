"""Figures of stored results as the documents show them."""

from typing import Any

from benchmarks.quality.store import Store
from meswitch.evaluate import Comparison


def references(store: Store, expert: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    reference = store.references[expert]
    return reference["base"], reference["expert"]


def bits(*jobs: dict[str, Any]) -> str:
    """Bits per weight; from the least to the most, where experts differ."""
    sizes = [f"{job['bits_per_weight']:.2f}" for job in sorted(jobs, key=lambda job: job["bits_per_weight"])]
    return sizes[0] if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"


def kl(value: float) -> str:
    return f"{value:.3g}"


def retained(job: dict[str, Any]) -> str:
    if job.get("gain") is None:
        return "-"
    low, high = job["interval"]
    return f"{job['gain']:.1%} [{low:.1%}, {high:.1%}]"


def versus(test: Comparison) -> str:
    return f"{test.lost}/{test.gained}, p = {test.p_value:.1g}"


def missing(suite: str) -> str:
    return f"Not measured yet: `python benchmarks/quality/run.py {suite}`."


def caption(store: Store) -> str:
    meta = store.meta
    told = f"{meta['questions']} questions an expert, seed {meta['seed']}; KL in nats a token on "
    told += f"{meta['fidelity_questions']} answers of the full expert."
    failed: dict[str, list[str]] = {}
    for setting, expert, reason in store.failed():
        failed.setdefault(f"{setting.group}, {setting.label}: {reason}", []).append(expert)
    if not failed:
        return told
    return f"{told}\n\nFailed:\n\n" + "\n".join(f"- {what} ({', '.join(names)})" for what, names in failed.items())

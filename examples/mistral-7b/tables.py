"""Fill the tables of README.md from `meswitch plan` over the committed configurations, and from synthetic.json.

    python examples/mistral-7b/tables.py            rewrite what is out of date
    python examples/mistral-7b/tables.py --check    say so instead, and exit 1

A place to fill stands between `<!-- NAME -->` and `<!-- end -->`, as in the README of the repository.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from meswitch.checkpoint import Checkpoint
from meswitch.cli.plan import plan_report
from meswitch.compression.options import Options
from meswitch.compression.plan import outline

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.common.markdown_tables import fill, has_place, pipe  # noqa: E402

CONFIGS = HERE / "configs"
GB = 1e9
# The paper's own layout is one scale a row and whole embeddings; the other rows are ours.
SETTINGS = {
    "2 bits, a scale for 128 (the default)": Options(),
    "2 bits, a scale a row": Options(group_size=None),
    "2 bits, a scale a row, embeddings whole (the paper's layout)": Options(group_size=None, embeddings="exact"),
    "1 bit, a scale for 128": Options(bits=1),
    "3 bits, a scale for 128": Options(bits=3),
    "4 bits, a scale for 128": Options(bits=4),
}
CONTENTS = ("codes", "scales", "salient channels", "exact tensors", "added rows", "shapes")


@cache
def model(family: str, role: str) -> Checkpoint:
    return outline(CONFIGS / family / role)


def experts(family: str) -> list[str]:
    """The experts' names, the one with the largest vocabulary first."""
    roles = [path.name for path in CONFIGS.joinpath(family).iterdir() if path.name != "base"]
    return sorted(roles, key=lambda role: (-model(family, role).config.vocab_size, role))


def plan(family: str, role: str, options: Options | None = None, **more: Any) -> dict[str, Any]:
    return plan_report(model(family, "base"), model(family, role), options or Options(), **more)


def sizes(family: str) -> str:
    """One row an expert."""
    head = ["expert", "vocabulary", "full", "artifact", "bits/weight", "smaller", "of it added rows"]
    rows = []
    for role in experts(family):
        found = plan(family, role)
        rows.append(
            [
                role,
                str(found["expert"]["vocab_size"]),
                f"{found['expert']['bytes'] / GB:.3f} GB",
                f"{found['bytes']['tensors']:,} B",
                f"{found['bits_per_weight']:.3f}",
                f"{found['ratio']:.2f}x",
                f"{found['bytes']['by_content'].get('added rows', 0):,} B",
            ]
        )
    return pipe(head, *rows)


def content(family: str) -> str:
    """Where the largest expert's bytes are."""
    found = plan(family, experts(family)[0])
    roles = found["bytes"]["by_role"]
    columns = [("linear",), ("embedding",), ("head",), tuple(set(roles) - {"linear", "embedding", "head"})]
    rows = []
    for kind in CONTENTS:
        cells = [sum(roles.get(role, {}).get(kind, 0) for role in column) for column in columns]
        if sum(cells):
            rows.append([kind, *(f"{cell:,}" if cell else "-" for cell in cells), f"{sum(cells):,}"])
    sums = [sum(sum(roles.get(role, {}).values()) for role in column) for column in columns]
    rows.append(["all", *(f"{cell:,}" for cell in sums), f"{sum(sums):,}"])
    return pipe(["bytes", "linear layers", "embedding", "head", "norms", "all"], *rows)


def settings(family: str) -> str:
    """What other settings would take, and the paper's comparison: base and three experts against three full models."""
    head = ["setting", "an expert", "bits/weight", "base + 3", "3 full models", "ratio"]
    rows = []
    for name, options in SETTINGS.items():
        found = plan(family, experts(family)[0], options, experts=3, kv_tokens=0)
        memory = found["memory"]
        rows.append(
            [
                name,
                f"{found['bytes']['tensors'] / GB:.3f} GB",
                f"{found['bits_per_weight']:.3f}",
                f"{memory['compressed'] / GB:.2f} GB",
                f"{memory['full_models'] / GB:.2f} GB",
                f"{memory['full_models'] / memory['compressed']:.2f}x",
            ]
        )
    return pipe(head, *rows)


def memory(family: str) -> str:
    """Base and so many slots with a KV cache of 32768 tokens, against as many full models."""
    largest = experts(family)[0]
    head = ["experts", "base + slots + KV cache", "full models + KV cache", "ratio"]
    rows = []
    for count in (1, 3, 4, 8, 16, 32):
        found = plan(family, largest, experts=count)["memory"]
        ours, full = found["compressed"], found["full_models"]
        rows.append([str(count), f"{ours / GB:.1f} GB", f"{full / GB:.1f} GB", f"{full / ours:.2f}x"])
    fits = []
    for limit in (24, 48, 80):
        found = plan(family, largest, limit=limit * 10**9)["memory"]
        room = found["limit"] >= found["base"] + found["kv_cache"]
        ours = f"base + {found['experts_that_fit']}" if room else "not even the base"
        fits.append([f"{limit} GB", ours, str(found["full_models_that_fit"])])
    kv = f"{found['kv_cache'] / GB:.2f} GB of each line are the KV cache."
    return f"{pipe(head, *rows)}\n\n{kv} With it fit:\n\n{pipe(['memory', 'experts', 'full models'], *fits)}"


def synthetic() -> str:
    """What the synthetic run took here."""
    data = json.loads((HERE / "synthetic.json").read_text())
    steps = [
        [step["name"], f"{step['seconds']:.0f} s", f"{step['peak_bytes'] / 2**30:.2f} GiB"] for step in data["steps"]
    ]
    total = ["all, the drawing of the checkpoints included", f"{data['seconds']:.0f} s"]
    took = pipe(["step", "seconds", "peak memory"], *steps, [*total, f"{data['peak_bytes'] / 2**30:.2f} GiB"])
    head = ["expert", "vocabulary", "full", "artifact", "planned", "bits/weight"]
    rows = [
        [
            row["expert"],
            str(row["vocab_size"]),
            f"{row['full_bytes'] / GB:.3f} GB",
            f"{row['tensor_bytes']:,} B",
            "the same" if row["planned_bytes"] == row["tensor_bytes"] else f"{row['planned_bytes']:,} B",
            f"{row['bits_per_weight']:.3f}",
        ]
        for row in data["experts"]
    ]
    meta, drawn, answer = data["meta"], data["synthetic"], data["answer"]
    agree = "gave" if answer["merged_agrees"] and answer["server_agrees"] else "did not all give"
    layers, threads = model("mistral-7b", "base").config.num_hidden_layers, meta["threads"] or meta["cores"]
    note = (
        f"{drawn['layers']} of {layers} layers at the true widths, {drawn['calibration_tokens']} calibration tokens "
        f"for the first expert; the engine, the merged checkpoint and the server {agree} the same answer. Torch used "
        f"{threads} of {meta['cores']} CPU cores, {meta['date']}."
    )
    return f"{took}\n\n{pipe(head, *rows)}\n\n{note}"


PLACES: dict[str, Callable[[], str]] = {
    f"{name} {family}": partial(make, family)
    for family in ("mistral-7b", "llama-2-13b")
    for name, make in {"sizes": sizes, "content": content, "settings": settings, "memory": memory}.items()
} | {"synthetic": synthetic}


def filled(text: str) -> str:
    """The text with every place filled."""
    for name, make in PLACES.items():
        if has_place(text, name):
            text = fill(text, name, make())
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    file = HERE / "README.md"
    old = file.read_text()
    new = filled(old)
    if new != old and check:
        sys.exit(f"{file.name} is out of date: run `python examples/mistral-7b/tables.py`")
    file.write_text(new)


if __name__ == "__main__":
    main()

"""Fill the tables and figures of README.md from the stored results.

    python benchmarks/common/readme.py            rewrite what is out of date
    python benchmarks/common/readme.py --check    say so instead, and exit 1

A place to fill stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.common.generated import RESULTS, ROOT
from benchmarks.common.markdown_tables import fill, has_place
from benchmarks.quality import smollm2
from benchmarks.serving import vllm_doc
from benchmarks.serving.doc import on_gpu_briefly


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def memory() -> str:
    """One figure of the compression under a memory limit."""
    data = load("compress-memory-7b.json")
    sizes = f"({data['checkpoint_gb']:.1f} GB each) becomes a {data['artifact_gb']:.2f} GB artifact"
    sizes += f" of {data['bits_per_weight']:.2f} bits a weight"
    limits = f"limited to {data['limit_gib']:.0f} GiB, with {data['peak_rss_gib']:.1f} GiB resident at most"
    return f"a Mistral-7B-shaped pair {sizes} in a process whose address space is {limits}"


def cpu() -> str:
    """CPU seconds of a calibrated and of a data-free compression, beside a plain forward pass over the same text."""
    data = load("compress-cpu.json")
    rows = {row["what"]: row for row in data["rows"]}
    free, calibrated = rows["data-free"]["cpu_seconds"], rows["calibrated"]["cpu_seconds"]
    forward = rows["floor: forward pass over the tokens"]["cpu_seconds"]
    meta, tokens = data["meta"], rows["calibrated"]["tokens"]
    millions = f"{meta['parameters'] / 1e6:.0f} million parameters"
    return (
        f"On one core ({meta['cpu']}) a model of {millions} takes {free:.0f} s of CPU data-free and {calibrated:.0f} s "
        f"calibrated, {calibrated / free:.1f} times as much; a plain forward pass over the {tokens} tokens that it is "
        f"measured on takes {forward:.0f} s of it"
    )


PLACES: dict[str, tuple[Callable[[], str], bool]] = {
    "quality": (lambda: smollm2.answer(load("smollm2.json")), True),
    "served": (vllm_doc.served, True),
    "embedded": (lambda: on_gpu_briefly(load("engine-h200.json")), False),
    "memory": (memory, False),
    "cpu": (cpu, False),
}


def filled(text: str) -> str:
    """The text with every place filled."""
    for name, (make, block) in PLACES.items():
        if has_place(text, name):
            text = fill(text, name, make(), block=block)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    file = ROOT / "README.md"
    old = file.read_text()
    new = filled(old)
    if new != old and check:
        sys.exit("README.md is older than benchmarks/results: run `python benchmarks/common/readme.py`")
    file.write_text(new)


if __name__ == "__main__":
    main()

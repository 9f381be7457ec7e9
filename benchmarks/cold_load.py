"""What a cold expert costs: from disk to host memory, and from there to a slot, at true shapes.

    python benchmarks/cold_load.py [--model mistral-7b] [--layers 8] [--out results.json]

A random artifact is written first, so its files are in the page cache: the disk's own time comes on top. "read" is
`Artifact.read` for every tensor with its checksum, once in one thread and once read ahead; "lay out" is what reading
into the kernels' layout takes more (on a GPU where there is one); "copy" is the one copy into a slot.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vllm_doc import steps_table
from vllm_models import SHAPES, write_artifact, write_config


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The fastest of some."""
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def measure(directory: Path, repeats: int) -> dict[str, float]:
    from meswitch.artifact import Artifact, ReadAhead
    from meswitch.experts.layout import Layout
    from meswitch.pagelock import copy, page_locked

    artifact = Artifact.open(directory)
    names = list(artifact.manifest.tensors)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = Layout.of(artifact, kernel=True)
    buffer = page_locked(layout.nbytes, device)
    slot = torch.empty_like(buffer, device=device)

    def ahead() -> None:
        with ReadAhead(artifact, names) as reader:
            for name in names:
                reader.read(name)

    found = {
        "gigabytes": layout.nbytes / 1e9,
        "read, one thread": seconds(lambda: [artifact.read(name) for name in names], repeats),
        "read ahead": seconds(ahead, repeats),
        "page-lock": seconds(lambda: page_locked(layout.nbytes, device), 1),
        "read ahead and laid out": seconds(lambda: layout.fill(artifact, buffer, device), repeats),
        "copy into a slot": seconds(lambda: copy(slot, buffer, non_blocking=True), repeats),
    }
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--layers", type=int, help="fewer layers of it")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    SHAPES[options.model]["num_hidden_layers"] = options.layers or SHAPES[options.model]["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as scratch:
        base = write_config(Path(scratch) / "base", options.model)
        found = measure(write_artifact(base, Path(scratch) / "delta", options.bits), options.repeat)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{found['gigabytes']:.2f} GB in a slot, {card}\n\n{steps_table(found)}")
    if options.out:
        meta = {"card": card, "date": time.strftime("%Y-%m-%d"), "versions": {"torch": torch.__version__}}
        settings = {"model": options.model, "layers": options.layers, "bits": options.bits}
        options.out.write_text(json.dumps({"meta": meta | {"settings": settings}, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

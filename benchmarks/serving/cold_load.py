"""What a cold expert costs: from disk to host memory, and from there to a slot, at true shapes.

    python benchmarks/serving/cold_load.py [--model mistral-7b] [--layers 8] [--out results.json]

A random artifact is written first, so its files are in the page cache: the disk's own time comes on top. "read" is
`Artifact.read` for every tensor with its checksum, once in one thread and once read ahead; "lay out" is what reading
into the kernels' layout takes more (on a GPU where there is one); "copy" is the one copy into a slot. Page-locked
memory for it is ours, and as PyTorch's allocator gives it. On a GPU each step is taken a second time while another
thread launches kernel after kernel, as decoding does: the longest that it waits for one.
"""

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.serving.vllm_doc import steps_table
from benchmarks.serving.vllm_shapes import SHAPES, write_artifact, write_config


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


def longest_wait(work: Callable[[], object]) -> float:
    """The longest time between two kernels of another thread meanwhile, in ms."""
    times, done = list[float](), threading.Event()

    def launches() -> None:
        small = torch.zeros(1, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            while not done.is_set():
                small.add_(1)
                torch.cuda.current_stream().synchronize()
                times.append(time.perf_counter())

    thread = threading.Thread(target=launches)
    thread.start()
    while len(times) < 100:
        time.sleep(0.01)
    first = len(times)
    try:
        work()
        torch.cuda.synchronize()
    finally:
        done.set()
        thread.join()
    return max(b - a for a, b in itertools.pairwise(times[first - 1 :])) * 1e3


def measure(directory: Path, repeats: int) -> dict[str, dict[str, float]]:
    from meswitch.artifact import Artifact, ReadAhead
    from meswitch.pagelock import copy_locked, page_locked
    from meswitch.slots.layout import Layout

    artifact = Artifact.open(directory)
    names = list(artifact.manifest.tensors)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    layout = Layout.of(artifact, kernel=True)
    buffer = page_locked(layout.nbytes, device)
    slot = torch.empty_like(buffer, device=device)
    held = list[torch.Tensor]()  # to the end: what is let go of is unlocked in the background, of the next step's time

    def ahead() -> None:
        with ReadAhead(artifact, names) as reader:
            for name in names:
                reader.read(name)

    locking: dict[str, Callable[[], object]] = {
        "page-lock": lambda: held.append(page_locked(layout.nbytes, device)),
        "page-lock, PyTorch": lambda: held.append(torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=True)),
    }
    steps: dict[str, Callable[[], object]] = {
        "read, one thread": lambda: [artifact.read(name) for name in names],
        "read ahead": ahead,
        **(locking if on_gpu else {}),
        "read ahead and laid out": lambda: layout.fill(artifact, buffer, device),
        "copy into a slot": lambda: copy_locked(slot, buffer, non_blocking=True),
    }
    taken = {name: seconds(work, 1 if name in locking else repeats) for name, work in steps.items()}
    waits = {name: longest_wait(work) for name, work in steps.items()} if on_gpu else {}
    return {
        "seconds": {"gigabytes": round(layout.nbytes / 1e9, 4)} | {n: round(value, 4) for n, value in taken.items()},
        "waits_ms": {name: round(value, 1) for name, value in waits.items()},
    }


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
    print(f"{found['seconds']['gigabytes']:.2f} GB in a slot, {card}\n\n{steps_table(found)}")
    if options.out:
        meta = {"card": card, "date": time.strftime("%Y-%m-%d"), "versions": {"torch": torch.__version__}}
        settings = {"model": options.model, "layers": options.layers, "bits": options.bits}
        options.out.write_text(json.dumps({"meta": meta | {"settings": settings}} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()

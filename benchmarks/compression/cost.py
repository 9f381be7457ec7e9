"""What compressing an expert costs at the shapes of a 7B model: seconds, device memory, host memory.

    python benchmarks/common/synthetic.py PAIR --layers 8 [--tokenizer examples/family/base]
    python benchmarks/compression/cost.py PAIR --device cuda [--only data-free|calibrated|trained] [--json FILE]

Data-free, calibrated with error feedback, and trained block by block at 1.3 bits a weight, each in a process of its
own. A pair with fewer layers than the model has is enough: seconds are counted a tensor, and the table gives what was
measured and what all the model's layers take, the seconds of a layer being the mean over the layers after the first.
The trained one is counted as a whole, in proportion to the layers, so embedding and head as often: that is the most it
takes; `told` are the seconds until each of its steps was told of, by phase. The floor is reading both checkpoints once
from where they lie; start-up and imports are not counted.

`phases` are the seconds of the main thread, in all: waiting for a pair to be read and hashed, encoding (on a GPU with
all that was under way before), waiting for the writer, running the expert forward (`other`); and those that the two
other threads worked beside it.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

LAYERS = 32  # of Mistral-7B
TEXT_TOKENS, LENGTH = 524288, 256
SETTINGS = {  # options of `meswitch.compress`; True: with the text
    "data-free": {"calibration": False, "distill": 0},
    "calibrated, error feedback": {"calibration": True, "distill": 0},
    "trained at 1.3 bits": {"calibration": True, "target_bpw": 1.3, "distill_scope": "block"},
}
WORKER = """
import json, resource, sys, time
import torch, meswitch
from meswitch.compression.convert import PairReader, WriterThread
from meswitch.compression.convert import Converter
base, expert, out, device, options = sys.argv[1:6]
stamps, phases, told = [], {}, {}
def timed(owner, method, phase, sync=False):
    call = getattr(owner, method)
    def timing(*args, **keywords):
        started = time.perf_counter()
        try:
            return call(*args, **keywords)
        finally:
            if sync and device == "cuda":
                torch.cuda.synchronize()
            phases[phase] = phases.get(phase, 0.0) + time.perf_counter() - started
    setattr(owner, method, timing)
timed(PairReader, "take", "wait_for_reader")
timed(PairReader, "_read", "reader")
timed(Converter, "_encode", "encode", sync=True)
timed(WriterThread, "wait", "wait_for_writer")
timed(meswitch.artifact.ArtifactWriter, "add", "writer")
def progress(phase, done, total, name):
    if device == "cuda":
        torch.cuda.synchronize()
    stamps.append((name, time.perf_counter()))
    told[phase] = told.get(phase, 0.0) + stamps[-1][1] - (stamps[-2][1] if len(stamps) > 1 else started)
def say(line):
    print(line, file=sys.stderr, flush=True)
if device == "cuda":
    torch.zeros(1, device=device)
started = time.perf_counter()
artifact = meswitch.compress(base, expert, out, device=device, progress=progress, notice=say, **json.loads(options))
seconds = time.perf_counter() - started
main = sum(phases.get(phase, 0.0) for phase in ("wait_for_reader", "encode", "wait_for_writer"))
print(json.dumps({
    "phases": {**phases, "other": seconds - main},
    "told": told,
    "started": started,
    "seconds": seconds,
    "stamps": stamps,
    "layers": json.load(open(expert + "/config.json"))["num_hidden_layers"],
    "device_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "bits_per_weight": artifact.bits_per_weight,
    "card": torch.cuda.get_device_name() if device == "cuda" else None,
    "torch": torch.__version__,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=[setting.split()[0].strip(",") for setting in SETTINGS])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.pair) as scratch:
        text = Path(scratch) / "text.txt"
        write_text(text)
        read = read_seconds(options.pair)
        for label, keywords in SETTINGS.items():
            if options.only and not label.startswith(options.only):
                continue
            paths = [str(options.pair / "base"), str(options.pair / "expert"), f"{scratch}/{len(rows)}"]
            keywords = json.dumps(keywords | {"calibration": str(text) if keywords["calibration"] else None})
            command = [sys.executable, "-c", WORKER, *paths, options.device, keywords]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(
                {"setting": label, **summary(json.loads(done.stdout.splitlines()[-1]), label), "read_seconds": read}
            )
            print(json.dumps(rows[-1]), flush=True)
    card, torch_version = [(row.pop("card"), row.pop("torch")) for row in rows].pop()
    meta = {
        "date": datetime.now(UTC).date().isoformat(),
        "card": card,
        "torch": torch_version,
        "python": platform.python_version(),
        "layers": LAYERS,
    }
    if options.json:
        options.json.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


def write_text(file: Path) -> None:
    """Random words of one token or a few each: what the numbers are does not change what the work is."""
    import random

    draw = random.Random(0)
    words = ["the", "sum", "of", "two", "list", "value", "query", "name", "table", "return", "if", "how", "many", "and"]
    lines = [" ".join(draw.choice(words) for _ in range(LENGTH)) for _ in range(TEXT_TOKENS // LENGTH)]
    file.write_text("\n".join(lines) + "\n")


def read_seconds(pair: Path) -> float:
    """Seconds to read both checkpoints once."""
    import time

    started = time.perf_counter()
    buffer = bytearray(1 << 26)
    for file in sorted(pair.glob("*/*.safetensors")):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return round(time.perf_counter() - started, 2)


def summary(found: dict, setting: str) -> dict:
    """Seconds of the layers and of the rest, from when each tensor was done."""
    if setting.startswith("trained"):
        layers = found["layers"]
        of_layers = {
            "layers_measured": layers,
            "seconds_measured": round(found["seconds"], 1),
            "seconds_of_all_layers": round(found["seconds"] * LAYERS / layers, 1),
            "told": {phase: round(seconds, 1) for phase, seconds in found["told"].items()},
        }
    else:
        of_layers = by_layer(found)
    return {
        **of_layers,
        "phases": {phase: round(seconds, 2) for phase, seconds in sorted(found["phases"].items())},
        "device_gib": found["device_gib"] and round(found["device_gib"], 2),
        "host_gib": round(found["host_gib"], 2),
        "bits_per_weight": round(found["bits_per_weight"], 3),
        "card": found["card"],
        "torch": found["torch"],
    }


def by_layer(found: dict) -> dict:
    """Seconds of a layer, of the rest, and of all the model's layers."""
    before, seconds, rest = found["started"], {}, 0.0
    for name, stamp in found["stamps"]:
        parts = name.split(".")
        layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
        if layer is None:
            rest += stamp - before
        else:
            seconds[layer] = seconds.get(layer, 0.0) + stamp - before
        before = stamp
    later = [taken for layer, taken in seconds.items() if layer] or list(seconds.values())
    mean = sum(later) / len(later)
    tail = found["started"] + found["seconds"] - before
    return {
        "layers_measured": len(seconds),
        "seconds_measured": round(found["seconds"], 1),
        "seconds_a_layer": round(mean, 2),
        "seconds_rest": round(rest + tail, 1),
        "seconds_of_all_layers": round(seconds[0] + mean * (LAYERS - 1) + rest + tail, 1),
    }


if __name__ == "__main__":
    main()

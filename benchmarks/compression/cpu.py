"""What calibrated compression costs on a CPU against data-free: CPU seconds of one thread, beside what must be done.

    python benchmarks/compression/cpu.py [--model llama-374m] [--repeats 1] [--json FILE]

A pair of true shapes is drawn (`synthetic.py`), in bf16. Each setting runs in a process of its own with one thread;
start-up and imports are not counted. CPU seconds are those of all threads, user and system, so that other work on the
machine changes them little; with several repeats the least is kept. Floors: a plain forward pass of the model over the
tokens that are measured, without the head, in the dtype that compression chooses for this CPU; and reading both
checkpoints and writing what the artifact takes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.common.synthetic import MODELS, write_pair
from benchmarks.compression.cost import write_text

TOKENIZER = Path(__file__).parents[2] / "examples" / "family" / "base"
SETTINGS: dict[str, dict[str, Any]] = {
    "data-free": {},
    "calibrated": {"calibration": "{text}", "distill": 0},
    "calibrated, 32768 tokens": {"calibration": "{text}", "calibration_tokens": 32768, "distill": 0},
}
COMPRESS = """
import json, resource, sys, time
import torch, meswitch
torch.set_num_threads(1)
meswitch.compress, meswitch.Options
before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
artifact = meswitch.compress(*sys.argv[1:4], **json.loads(sys.argv[4]))
after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - started
calibration = artifact.manifest.method.calibration
print(json.dumps({
    "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    "seconds": seconds,
    "tokens": calibration and (calibration.measured_tokens or calibration.tokens),
    "peak_rss_gib": after.ru_maxrss / 2**20,
    "bits_per_weight": artifact.bits_per_weight,
    "bytes": artifact.nbytes,
}))
"""
FORWARD = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
from meswitch.checkpoint import Checkpoint
from meswitch.compression.partial_model import working_dtype
from meswitch.compression.text import load_calibration
torch.set_num_threads(1)
expert, text, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
dtype = working_dtype(torch.device("cpu"), Checkpoint.open(expert).parameters)
model = AutoModelForCausalLM.from_pretrained(expert, dtype=dtype).eval()
sequences = load_calibration(text, expert, tokens).sequences
started = time.process_time()
with torch.no_grad():
    for ids in sequences:
        model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
seconds = time.process_time() - started
print(json.dumps({"cpu_seconds": seconds, "tokens": sum(map(len, sequences)), "dtype": str(dtype)}))
"""
FILES = """
import json, os, sys, time
from pathlib import Path
pair, count = Path(sys.argv[1]), int(sys.argv[2])
started, buffer = time.process_time(), bytearray(1 << 26)
for file in sorted(pair.glob("*/*.safetensors")):
    with file.open("rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass
with open(sys.argv[3], "wb", buffering=0) as handle:
    while count > 0:
        count -= handle.write(memoryview(buffer)[:count])
    os.fsync(handle.fileno())
print(json.dumps({"cpu_seconds": time.process_time() - started}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-374m", choices=sorted(MODELS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options.model, options.repeats, options.only, Path(scratch))
    print(table(found["rows"]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(model: str, repeats: int, only: list[str], room: Path) -> dict[str, Any]:
    """All rows, and where they were measured."""
    write_pair(room / "pair", MODELS[model], 5 << 30, tokenizer=TOKENIZER)
    base, expert, text = room / "pair/base", room / "pair/expert", room / "text.txt"
    write_text(text)
    rows: list[dict[str, Any]] = []
    for name in only:
        keywords = json.dumps(SETTINGS[name]).replace("{text}", str(text))
        runs = [worker(COMPRESS, base, expert, room / f"{len(rows)}-{repeat}", keywords) for repeat in range(repeats)]
        rows.append({"what": name} | min(runs, key=lambda run: run["cpu_seconds"]))
        print(rows[-1], file=sys.stderr, flush=True)
    tokens = next((row["tokens"] for row in rows if row["tokens"]), 4096)
    rows.append({"what": "floor: forward pass over the tokens"} | worker(FORWARD, expert, text, tokens))
    rows.append({"what": "floor: reading and writing"} | worker(FILES, room / "pair", rows[0]["bytes"], room / "file"))
    meta = {
        "date": datetime.now(UTC).date().isoformat(),
        "model": model,
        "parameters": parameters(expert),
        "cpu": cpu(),
        "threads": 1,
        "torch": worker("import torch, json; print(json.dumps(torch.__version__))"),
        "python": platform.python_version(),
    }
    return {"meta": meta, "rows": rows}


def worker(code: str, *arguments: Any) -> Any:
    """What a process of one thread prints last, as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def parameters(expert: Path) -> int:
    from meswitch.checkpoint import Checkpoint

    return Checkpoint.open(expert).parameters


def cpu() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def table(rows: list[dict[str, Any]]) -> str:
    """CPU seconds of every row, and how many times the data-free ones they are."""
    free = rows[0]["cpu_seconds"]
    lines = [f"{'':40} {'tokens':>8} {'CPU s':>8} {'of data-free':>13}"]
    for row in rows:
        tokens, seconds = row.get("tokens") or "", row["cpu_seconds"]
        lines.append(f"{row['what']:40} {tokens:>8} {seconds:8.1f} {seconds / free:13.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Seconds to compress each expert of the example family with the default settings, as a person would.

    python benchmarks/compression/family.py [--experts math] [--repeats 3] [--json FILE]

The whole command is timed: start-up, calibration with error feedback, distillation, writing. `seconds` is the median.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

FAMILY = Path(__file__).parents[2] / "examples" / "family"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="+", default=["math", "code", "instruct", "sql"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for expert in options.experts:
        runs = [_once(expert) for _ in range(options.repeats)]
        seconds = [run["seconds"] for run in runs]
        median, steps = statistics.median(seconds), runs[0]["steps"]
        rows.append({"expert": expert, "seconds": median, "all": seconds, "steps": steps})
        print(rows[-1], flush=True)
    meta = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if options.json:
        options.json.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


def _once(expert: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "meswitch", "compress", "--expert", str(FAMILY / expert), "--base"]
        command += [str(FAMILY / "base"), "--out", f"{scratch}/delta", "--json"]
        command += ["--calibration", str(FAMILY / "calibration" / f"{expert}.jsonl")]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        method = json.loads((Path(scratch) / "delta" / "meswitch.json").read_text())["method"]
    return {"seconds": round(seconds, 1), "steps": method["distillation"]["steps"]}


if __name__ == "__main__":
    main()

"""Accuracy of the example family's experts, compressed, against bytes.

    python benchmarks/family_quality.py [--questions 1000] [--json benchmarks/results/family-quality.json]

For each setting every expert is compressed anew (whole artifact counted: codes, scales, salient channels, embeddings,
norms) and asked the same questions as the full fine-tune and the base, by the merged model in float32. `naive` is the
peer: 2-bit rounding without calibration and salient channels, embeddings exact. The floor is the base: gain 0.
"""

import argparse
import json
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

import meswitch
from meswitch.evaluate import Settings, evaluate_family

FAMILY = Path(__file__).parent.parent / "examples" / "family"
EXPERTS = ("math", "code", "instruct", "sql")
SETTINGS: dict[str, dict] = {
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2},
    "2 bits, a scale a row": {"bits": 2, "group_size": None},
    "2 bits, data-free": {"bits": 2, "calibration": None},
    "naive 2 bits": {"bits": 2, "calibration": None, "salient": 0, "embeddings": "exact"},
    "1 bit": {"bits": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000, help="an expert")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    experts = {name: str(FAMILY / name) for name in EXPERTS}
    for label in options.settings:
        with tempfile.TemporaryDirectory() as scratch:
            deltas, seconds = {}, {}
            for name in EXPERTS:
                calibration = FAMILY / "calibration" / f"{name}.jsonl"
                started = time.perf_counter()
                chosen = {"calibration": calibration} | SETTINGS[label]
                meswitch.compress(FAMILY / "base", FAMILY / name, Path(scratch) / name, **chosen)
                seconds[name] = round(time.perf_counter() - started, 1)
                deltas[name] = str(Path(scratch) / name)
            measured = evaluate_family(
                FAMILY / "base", experts, deltas, settings=Settings(n=options.questions, seed=options.seed)
            )
        for row in (r.to_dict() for r in measured.rows):
            if row["kind"] == "delta":
                del row["path"]
                rows.append({"setting": label, "compress_seconds": seconds[row["model"]], **row})
                print(json.dumps(rows[-1]), flush=True)
    meta = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "meswitch": meswitch.__version__,
        "questions": options.questions,
        "seed": options.seed,
    }
    if options.json:
        options.json.parent.mkdir(exist_ok=True)
        options.json.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How much memory and time does compressing a 7B fine-tune take? Peak memory is enforced, not only measured.

    python benchmarks/compression/memory.py PAIR [--limit-gib 6] [--json FILE]

PAIR holds `base/` and `expert/` (see synthetic.py). The compression runs in a process whose address space may not grow
beyond the limit (RLIMIT_AS: every mapping counts, the libraries too), so that it fails where it would need more.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

WORKER = """
import json, resource, sys, time
limit = int(float(sys.argv[4]) * 2**30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
import meswitch, torch
started = time.perf_counter()
options = json.loads(sys.argv[5])
seen = [time.perf_counter()]
def progress(phase, done, total, name):
    if time.perf_counter() - seen[0] > 20:
        seen[0] = time.perf_counter()
        print(f"{done}/{total} {name}", file=sys.stderr, flush=True)
artifact = meswitch.compress(sys.argv[1], sys.argv[2], sys.argv[3], progress=progress, **options)
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "bits_per_weight": artifact.bits_per_weight,
    "artifact_gb": artifact.nbytes / 1e9,
    "checkpoint_gb": artifact.manifest.expert.bytes / 1e9,
    "threads": torch.get_num_threads(),
    "torch": torch.__version__,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--limit-gib", type=float, default=6)
    parser.add_argument("--options", default="{}", help="JSON: keyword arguments of meswitch.compress")
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.pair) as scratch:
        paths = [str(options.pair / "base"), str(options.pair / "expert"), f"{scratch}/delta"]
        command = [sys.executable, "-c", WORKER, *paths, str(options.limit_gib), options.options]
        started = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(
                f"the compression failed after {time.perf_counter() - started:.0f} s under {options.limit_gib} GiB"
            )
    row = json.loads(done.stdout.splitlines()[-1])
    pages = resource.getpagesize()
    result = {
        "meta": {
            "date": datetime.now(UTC).date().isoformat(),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {row['threads']} threads, page {pages}",
        },
        "limit_gib": options.limit_gib,
        "options": json.loads(options.options),
        **row,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

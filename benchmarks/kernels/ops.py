"""The expert op on a GPU: correctness, decode steps against the bandwidth floor and what others take, prefill.

PYTHONPATH=src python benchmarks/kernels/ops.py --out benchmarks/results/ops-h100.json

A step is all linears of a model, one after another in one CUDA graph, without what lies between them. Eight layers have
weights and deltas of their own and a step goes round them, so that 16 experts fit: between two uses of any weight a
step reads more than 3 GB, and L2 holds 50 MB. Times are medians. `ms` is the faster of one fused launch a linear and of
cuBLAS with the delta kernel after it; `path` says which. `merged_ms` is one merged bf16 model after another for their
own tokens. `bitdelta_ms`: our kernels at 1 bit with a scale a row. `lora16_ms`, `lora64_ms`: the base and two batched
products of torch over gathered tokens.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.kernels import check, decode, prefill
from benchmarks.kernels.timing import copy_gb_s, measured_on, read_gb_s
from meswitch.ops.triton.ahead import compile_ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--workers", type=int, default=15, help="threads that compile")
    parser.add_argument("--check-only", action="store_true", help="numbers, no timings")
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--no-decode", action="store_true", help="prefill only")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further decode point starts")
    args = parser.parse_args()
    started = time.perf_counter()
    result: dict = {"meta": measured_on() | {"layers_of_their_own": decode.DEPTH}}

    def elapsed() -> float:
        return time.perf_counter() - started

    def stage(name: str) -> None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"-- {name} at {elapsed():.0f} s", flush=True)

    long_steps = not args.no_prefill and not args.check_only
    wanted = [check.wanted(case) for case in check.cases()]
    if not args.check_only and not args.no_decode:
        wanted += decode.wanted()
    if long_steps:
        wanted += prefill.wanted()
    print(f"{compile_ahead(wanted, args.workers)} kernels compiled", flush=True)
    stage("compiled")
    result["check"] = check.check()
    stage("checked")
    if args.check_only:
        return
    ways = copy_gb_s()
    copy = max(ways.values())
    result["meta"] |= {"copy_gb_s": copy, "copies_gb_s": ways, "read_gb_s": read_gb_s()}
    print(
        ", ".join(f"{way} {value:.0f}" for way, value in ways.items()), f"GB/s, read {result['meta']['read_gb_s']:.0f}"
    )
    result["decode"], model = [], None
    for name, bits, points in [] if args.no_decode else decode.PLAN:
        if elapsed() > args.budget:
            print(f"out of time before {name} at {bits} bits")
            break
        model = None  # frees the last one's memory before the next is drawn
        torch.cuda.empty_cache()
        model = decode.Model.random(name, bits)
        for batch, experts, spread in points:
            if elapsed() < args.budget:
                result["decode"].append(decode.point(model, batch, experts, spread, copy))
        stage(f"{name} at {bits} bits")
    model = None
    torch.cuda.empty_cache()
    result["prefill"] = prefill.prefill(copy) if long_steps else []
    stage("done")


if __name__ == "__main__":
    main()

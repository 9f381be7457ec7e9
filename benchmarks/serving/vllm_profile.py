"""Where a decode step in vLLM goes: its kernels and the gaps between them, by torch's profiler.

    python benchmarks/serving/vllm_profile.py [--layers 16] [--tokens 32] [--experts 0 4 16] [--out results.json]

vLLM alone, then with the deltas, each in a process of its own; ten steps of random weights of true shapes. A layer's
kernels are told apart by name and grid. Fewer layers are enough: a step is what they take times their number.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.serving.vllm_decode import asking, engine_options, in_own_process
from benchmarks.serving.vllm_shapes import SHAPES, write_artifact, write_config

STEPS = 10
ATTENTION = "kernel_unified_attention"  # once a layer; the profile asks for vLLM's Triton attention


def run_engine(kind: str, base: Path, adapter: Path | None, options: argparse.Namespace) -> None:
    """Prints a line of JSON for each number of experts."""
    import torch
    from vllm import LLM

    settings = engine_options(kind, base, max(options.experts), adapter) | {"attention_backend": "TRITON_ATTN"}
    settings["compilation_config"] = {"cudagraph_capture_sizes": [options.tokens]}
    engine = LLM(**settings, **({} if kind == "plain" else {"specialize_active_lora": True}))
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    ask = asking(base, adapter, length=64)

    for experts in [0] if kind == "plain" else options.experts:
        engine.generate(**ask(options.tokens, experts, 4))  # loads the experts, compiles what is left to compile
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            engine.generate(**ask(options.tokens, experts, 2 * STEPS + 4))
            torch.cuda.synchronize()
        trace = base / "trace.json"
        profile.export_chrome_trace(str(trace))
        row = summary(json.loads(trace.read_text())["traceEvents"], layers)
        print(json.dumps({"engine": kind, "tokens": options.tokens, "experts": experts} | row), flush=True)


def summary(events: list[dict], layers: int) -> dict:
    """Microseconds of a step, the mean of the last `STEPS` whole ones: span, sums of kernels, the largest of both.

    Args:
        events: of a Chrome trace.
    """
    events = sorted(
        (e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"]
    )
    attention = [i for i, event in enumerate(events) if event["name"] == ATTENTION]
    steps = len(attention) // layers
    if steps <= STEPS:
        raise SystemExit(f"{steps} steps with {ATTENTION} were profiled, {STEPS + 1} are needed: is this a GPU?")
    first, last = attention[(steps - STEPS - 1) * layers], attention[(steps - 1) * layers]
    kernels: dict[tuple, list[float]] = defaultdict(list)
    gaps = 0.0
    end = events[first]["ts"]
    for event in events[first:last]:
        kernels[event["name"].split("(")[0][:60], tuple(event["args"].get("grid", ()))].append(event["dur"])
        gaps += max(0.0, event["ts"] - end)
        end = max(end, event["ts"] + event["dur"])
    gaps += max(0.0, events[last]["ts"] - end)
    rows = [
        {"kernel": name, "grid": list(grid), "a_step": len(times) / STEPS, "us": round(sum(times) / len(times), 2)}
        for (name, grid), times in kernels.items()
    ]
    rows.sort(key=lambda row: -row["us"] * row["a_step"])
    return {
        "step_us": round((events[last]["ts"] - events[first]["ts"]) / STEPS, 1),
        "gaps_us": round(gaps / STEPS, 1),
        "kernels": rows[:20],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of a step")
    parser.add_argument("--experts", nargs="+", type=int, default=[0, 4, 16])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs=3, metavar=("ENGINE", "BASE", "ADAPTER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        kind, base, adapter = options.only
        run_engine(kind, Path(base), None if adapter == "-" else Path(adapter), options)
        return
    SHAPES[options.model]["num_hidden_layers"] = options.layers
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = write_config(Path(scratch) / "base", options.model)
        for kind in ("plain", "deltas"):
            adapter = "-" if kind == "plain" else write_artifact(base, Path(scratch) / "delta", options.bits)
            counts = ["--experts", *options.experts, "--tokens", options.tokens]
            rows += in_own_process(__file__, kind, base, adapter, *counts)
    for row in rows:
        print(f"\n{row['engine']}, {row['experts']} experts: a step {row['step_us']} us, gaps {row['gaps_us']}")
        for kernel in row["kernels"]:
            print(f"{kernel['a_step']:8.1f} x {kernel['us']:8.2f} us  {kernel['kernel']} {kernel['grid']}")
    if options.out:
        from benchmarks.serving.vllm_server import about  # the benchmark beside this file

        options.base = None
        options.out.write_text(json.dumps({"meta": about(options), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

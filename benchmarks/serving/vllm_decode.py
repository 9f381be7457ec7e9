"""Decoding in vLLM without a server: the base alone, deltas, LoRA and one expert at a time, at true shapes.

    python benchmarks/serving/vllm_decode.py [--model mistral-7b] [--out results.json] [--quick]

Each engine runs in a process of its own and takes all counts of experts one after another. All experts are the same
artifact under several names: each has its own slot, so the device reads as many bytes as for different ones. A token's
time is that of answers of `--tokens` tokens less that of answers of one, so that prefill does not count.

What a server adds to it is measured by `vllm_server.py`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.serving.vllm_shapes import SHAPES, write_artifact, write_config, write_lora

ENGINES = ("plain", "deltas", "lora-16", "lora-64", "swap")
PROMPT = 128


def engine_options(kind: str, base: Path, slots: int, adapter: Path | None) -> dict:
    options = {
        "model": str(base),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if torch.cuda.is_available():
        options |= {"dtype": "bfloat16", "compilation_config": {"max_cudagraph_capture_size": 64}}
        if os.environ.get("ATTENTION_BACKEND"):
            options["attention_backend"] = os.environ["ATTENTION_BACKEND"]
    if kind == "plain":
        return options
    options |= {"enable_lora": True, "max_loras": slots, "max_cpu_loras": max(slots, 16)}
    options["max_lora_rank"] = int(kind.removeprefix("lora-")) if kind.startswith("lora-") else 8
    if not kind.startswith("lora-"):
        settings = {"experts": [str(adapter)], "lora": False, "check_base": False}
        options |= {"worker_cls": "meswitch.vllm.DeltaWorker", "additional_config": {"meswitch": settings}}
    return options


def asking(base: Path, adapter: Path | None, length: int = PROMPT) -> Callable[[int, int, int], dict]:
    """Gives what `LLM.generate` takes: `batch` random prompts for `experts` in turn, answered in `new` tokens each."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    draw = random.Random(0)

    def ask(batch: int, experts: int, new: int) -> dict:
        prompts = [{"prompt_token_ids": [draw.randrange(1, vocabulary) for _ in range(length)]} for _ in range(batch)]
        names = [1 + i % experts for i in range(batch)] if experts else []
        requests = [LoRARequest(f"e{name - 1}", name, str(adapter)) for name in names] or None
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
        return {"prompts": prompts, "sampling_params": params, "lora_request": requests, "use_tqdm": False}

    return ask


def in_own_process(script: str, kind: str, *arguments: object) -> list[dict]:
    """The rows that `script --only kind ...` prints; says where it did not end well."""
    command = [sys.executable, script, "--only", kind, *map(str, arguments)]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{kind}: ended with {done.returncode}", file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"engine"')]


def run_engine(kind: str, base: Path, adapter: Path | None, counts: list[int], batches: list[int], tokens: int) -> list:
    """Every (batch, experts) of one engine: milliseconds a token and tokens a second."""
    from vllm import LLM

    started = time.perf_counter()
    # with one slot, vLLM runs one expert's requests after the other's
    engine = LLM(**engine_options(kind, base, 1 if kind == "swap" else max(counts), adapter))
    start_up = time.perf_counter() - started
    ask = asking(base, adapter)

    def seconds(batch: int, experts: int, new: int) -> float:
        asked = ask(batch, experts, new)
        begin = time.perf_counter()
        engine.generate(**asked)
        return time.perf_counter() - begin

    rows = []
    for experts in [0] if kind == "plain" else [0, *counts]:
        for batch in batches:
            if experts > batch:
                continue
            seconds(batch, experts, 4)  # loads the experts, compiles what is left to compile
            short = min(seconds(batch, experts, 1) for _ in range(3))
            long = min(seconds(batch, experts, tokens + 1) for _ in range(3))
            each = (long - short) / tokens
            row = {"engine": kind, "batch": batch, "experts": experts, "ms_per_token": round(each * 1e3, 3)}
            rows.append(row | {"tokens_per_s": round(batch / each, 1), "start_up_s": round(start_up, 1)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--experts", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--layers", type=int, help="fewer layers, to try it")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few tokens: does it run?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs=3, metavar=("ENGINE", "BASE", "ADAPTER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.model, options.experts, options.batches, options.tokens = "tiny", [1, 2], [2, 4], 8
    if options.only:
        kind, base, adapter = options.only
        path = None if adapter == "-" else Path(adapter)
        run_engine(kind, Path(base), path, options.experts, options.batches, options.tokens)
        return
    SHAPES[options.model]["num_hidden_layers"] = options.layers or SHAPES[options.model]["num_hidden_layers"]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = write_config(Path(scratch) / "base", options.model)
        for kind in options.engines:
            adapter: Path | str = "-"
            if kind in ("deltas", "swap"):
                adapter = Path(scratch) / "delta"
                if not adapter.exists():
                    write_artifact(base, adapter, options.bits)
            elif kind != "plain":
                adapter = write_lora(base, Path(scratch) / kind, int(kind.removeprefix("lora-")))
            counts = ["--experts", *options.experts, "--batches", *options.batches, "--tokens", options.tokens]
            rows += in_own_process(__file__, kind, base, adapter, *counts)
    print(table(rows))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def table(rows: list[dict]) -> str:
    """Markdown; the share is of the plain engine's tokens a second at the same batch."""
    plain = {row["batch"]: row["tokens_per_s"] for row in rows if row["engine"] == "plain"}
    lines = ["| engine | batch | experts | ms a token | tokens/s | of plain |", "| --- | --: | --: | --: | --: | --: |"]
    for row in rows:
        share = f"{row['tokens_per_s'] / plain[row['batch']]:.2f}" if row["batch"] in plain else ""
        cells = row["engine"], row["batch"], row["experts"], row["ms_per_token"], row["tokens_per_s"], share
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

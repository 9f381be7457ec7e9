"""The embedded engine on a GPU, beside transformers and what the memory allows.

    python benchmarks/serving/engine.py --work DIR [--layers 32] [--tokenizer examples/family/base] [--vllm]
        [--json FILE]

A base of Mistral-7B's shapes with random weights, and one fine-tune of it, compressed by the default without text and
served under several names: what a step costs does not depend on the numbers. Prompts are 24 tokens, answers 48. A
step's milliseconds are those of one token more: the time of 48 tokens less that of 8, over 40. `first_s` is the first
request of a kind after the engine says that it is ready, `seconds` the later ones; rows with `lengths` are of prompts
of many lengths, up to 64 requests of 16 experts, where nothing but that is measured. Peers, in the same run: the base
by transformers' `generate` and by its continuous batching; with `--vllm`, base and experts by vLLM with meswitch, in a
process beside, which starts while the engine does and is measured after it. The floor is reading what a step must
read, the base's matrices once and the deltas of its experts once, at the measured bandwidth of a copy.
"""

import argparse
import collections
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.common import synthetic
from meswitch import Engine

NAMES = [f"e{number}" for number in range(16)]
PROMPT, SHORT, LONG = 24, 8, 48
KINDS = ((1, 1), (1, 0), (8, 4), (32, 8), (32, 0), (64, 8), (128, 8))  # requests, experts; 0 is the base
STARTS = [
    (requests, experts) for requests in (1, 2, 5, 8, 20, 32, 64) for experts in (0, 1, 4, 16) if experts <= requests
]
FEW = 16  # new tokens
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and artifact are written, or are")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokenizer", type=Path, default=Path("examples/family/base"))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--vllm", action="store_true", help="measure vLLM with meswitch too; it must be installed")
    parser.add_argument("--again", action="store_true", help="then open it in a new process: how soon is it ready?")
    parser.add_argument("--as-again", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--as-vllm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("meswitch").setLevel(logging.DEBUG)
    if options.as_vllm:
        vllm(options.work)
        return
    if options.as_again:
        started = time.perf_counter()
        with opened(options, options.work / "artifact"):
            print(round(time.perf_counter() - started, 1))
        return
    config = synthetic.MODELS["mistral-7b"] | {"num_hidden_layers": options.layers}
    artifact = synthetic.compressed(options.work, config, tokenizer=options.tokenizer, device="cuda")
    bandwidth = copy_bandwidth()
    report: dict[str, Any] = {"meta": {}, "rows": []}
    report["meta"] = measured_on(options.layers, bandwidth) | {"prompt": PROMPT, "new_tokens": LONG}

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    def keep(row: Row) -> None:
        about = {"engine": row.pop("engine"), "model": f"mistral-7b, {options.layers} layers"}
        graphs = {"graphs": not options.no_graphs} if about["engine"] == "embedded" else {}
        row = about | graphs | row
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        save()

    torch.cuda.empty_cache()
    beside = Beside(options.work, options.json) if options.vllm else None
    embedded(options, artifact, bandwidth, report, keep, beside)
    for row in beside.rows() if beside else ():
        keep(row)
    if not options.no_peers:
        peers(options.work / "base", keep)
    if options.again:
        torch.cuda.empty_cache()
        command = [sys.executable, __file__, "--work", str(options.work), "--as-again"]
        command += ["--no-graphs"] * options.no_graphs
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report["meta"]["ready_again_s"] = json.loads(done.stdout.splitlines()[-1])
        print(f"opened again in {report['meta']['ready_again_s']} s", flush=True)
        save()


def measured_on(layers: int, bandwidth: float) -> Row:
    """What results carry of card, versions and model. bandwidth: of a copy, bytes a second."""
    return {
        "card": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers")},
        "model": "Mistral-7B's shapes, random weights",
        "layers": layers,
        "copy_tb_per_s": bandwidth / 1e12,
    }


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        seconds = timed(lambda: target.copy_(source))
        best = max(best, 2 * source.nbytes / seconds)
    return best


def timed(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def opened(options: argparse.Namespace, artifact: Path) -> Engine:
    experts = dict.fromkeys(NAMES, artifact)
    return Engine(options.work / "base", experts, device="cuda", slots=len(NAMES), cuda_graphs=not options.no_graphs)


def embedded(
    options: argparse.Namespace,
    artifact: Path,
    bandwidth: float,
    report: dict[str, Any],
    keep: Callable[[Row], None],
    beside: "Beside | None",
) -> None:
    cached = any(Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")).glob("*/fused_kernel.*"))
    started = time.perf_counter()
    engine = opened(options, artifact)
    report["meta"]["ready_s"] = round(time.perf_counter() - started, 1)
    report["meta"]["caches"] = "kernels in Triton's cache" if cached else "no kernel in Triton's cache"
    report["meta"]["memory"] = engine.memory()
    report["meta"]["memory_allocated"] = torch.cuda.memory_allocated()
    print(json.dumps(report["meta"]), flush=True)
    size = max(expert.bytes for expert in engine.store.residency())
    base = engine.memory()["base"]
    for name in NAMES:  # what a load takes is not what is measured here
        engine.store.release(engine.store.acquire(name))
    if beside:
        report["meta"]["vllm_ready_s"] = beside.ready()
    with engine:
        for requests, experts_asked in STARTS:
            keep(
                {"engine": "embedded", "requests": requests, "experts": experts_asked, "new_tokens": FEW}
                | first_and_later(engine, requests, NAMES[:experts_asked] or ["base"])
            )
        for requests, experts_asked in KINDS:
            names = NAMES[:experts_asked] or ["base"]
            row = measured(lambda new, r=requests, n=names: ask(engine, r, n, new), requests)
            floor = (base + size * min(experts_asked, requests)) / bandwidth
            keep(
                {"engine": "embedded", "requests": requests, "experts": experts_asked}
                | row
                | {"floor_ms": round(1000 * floor, 2)}
            )
        for prompt in (128, 512, 2000):
            prompts = [time_to_first(engine, NAMES[0], prompt) for _ in range(6)]
            keep(
                {
                    "engine": "embedded",
                    "requests": 1,
                    "experts": 1,
                    "prompt": prompt,
                    "ttft_ms": round(1000 * sorted(prompts)[2], 1),
                    "ttft_first_ms": round(1000 * prompts[0], 1),
                }
            )
        for requests, experts_asked in ((1, 1), (32, 8)):
            names = NAMES[:experts_asked]
            keep(
                {"engine": "embedded", "requests": requests, "experts": experts_asked}
                | parts(lambda r=requests, n=names: ask(engine, r, n, LONG), LONG)
            )
        keep(
            {"engine": "embedded", "requests": 1, "experts": 1, "prompt": 512}
            | parts(lambda: [time_to_first(engine, NAMES[0], 512) for _ in range(4)], 4)
        )


def ask(engine: Engine, requests: int, names: list[str], new: int) -> int:
    """How many tokens were made."""
    prompts = [[5 + number] * PROMPT for number in range(requests)]
    models = [names[number % len(names)] for number in range(requests)]
    answers = engine.generate(prompts, model=models, max_new_tokens=new)
    return sum(len(answer.tokens) for answer in answers)


def first_and_later(engine: Engine, requests: int, names: list[str]) -> Row:
    """Seconds of the first time and of later ones, for prompts of many lengths that no cache knows."""
    lengths = [20 + 61 * number % 180 for number in range(requests)]
    took = []
    for time_of in range(4):
        draw = torch.Generator().manual_seed(1000 * requests + 10 * len(names) + time_of)
        prompts = [torch.randint(5, 1000, (length,), generator=draw).tolist() for length in lengths]
        models = [names[number % len(names)] for number in range(requests)]
        took.append(timed(lambda p=prompts, m=models: engine.generate(p, model=m, max_new_tokens=FEW)))
    first, *later = took
    return {
        "lengths": f"{min(lengths)}-{max(lengths)}",
        "first_s": round(first, 3),
        "seconds": round(sorted(later)[1], 3),
    }


def measured(run: Callable[[int], Any], requests: int) -> Row:
    """run: makes so many tokens for each request; gives how many there were, if some request may end early."""
    started = time.perf_counter()
    tokens = run(LONG)
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    tokens = tokens if isinstance(tokens, int) else requests * LONG
    long = sorted(timed(lambda: run(LONG)) for _ in range(3))[1]
    short = sorted(timed(lambda: run(SHORT)) for _ in range(3))[1]
    return {
        "tokens_per_s": round(tokens / long, 1),
        "ms_per_step": round(1000 * (long - short) / (LONG - SHORT), 2),
        "seconds": round(long, 3),
        "first_s": round(first, 3),
    }


def time_to_first(engine: Engine, name: str, tokens: int) -> float:
    draw = torch.randint(5, 1000, (tokens,)).tolist()
    started = time.perf_counter()
    for _ in engine.stream(draw, model=name, max_new_tokens=2):
        return time.perf_counter() - started
    raise AssertionError("no token")


def parts(run: Callable[[], Any], steps: int) -> Row:
    """Where the time of steps goes: milliseconds of the card by kind of kernel, a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    by_kind: collections.Counter[str] = collections.Counter()
    for event in profile.key_averages():
        by_kind[kind_of(event.key)] += event.self_device_time_total / 1000 / steps
    return {"parts_ms": {name: round(ms, 3) for name, ms in by_kind.most_common()}}


def kind_of(kernel: str) -> str:
    kinds = {
        "fused_kernel": "base and deltas",
        "decode_kernel": "deltas",
        "merge": "prompts' weights",
        "product_kernel": "prompts' weights",
        "flex": "attention",
        "flash": "attention",
        "fmha": "attention",
        "gemm": "matrices of cuBLAS",
        "nvjet": "matrices of cuBLAS",
        "Memcpy": "copies",
        "Memset": "copies",
    }
    return next((kind for word, kind in kinds.items() if word in kernel), "the rest")


class Beside:
    """vLLM with meswitch in a process of its own: it starts at once, and measures when it is asked for its rows.

    Args:
        json: beside whose file it writes what vLLM logs.
    """

    def __init__(self, work: Path, json: Path | None) -> None:
        log = (json or work / "engine.json").with_suffix(".vllm.log").open("w")
        variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--as-vllm", "--work", str(work)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        self.process = subprocess.Popen(command, env=os.environ | variables, text=True, **pipes)

    def ready(self) -> float | None:
        """Seconds that its start took; None if it ended."""
        return next((row["ready_s"] for row in self._told()), None)

    def rows(self) -> Iterator[Row]:
        if self.process.poll() is None:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            yield from self._told()
        if self.process.wait():
            print(f"vLLM: ended with {self.process.returncode}", flush=True)

    def _told(self) -> Iterator[Row]:
        return (json.loads(line) for line in self.process.stdout if line.startswith('{"'))


def vllm(work: Path) -> None:
    """Start, say so, wait for a line, and print a row for each kind."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    started = time.perf_counter()
    artifact = str(work / "artifact")
    settings = {"experts": [artifact], "lora": False, "check_base": False}
    engine = LLM(
        model=str(work / "base"),
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=128,
        enable_prefix_caching=False,
        seed=0,
        gpu_memory_utilization=0.4,
        kv_cache_memory_bytes=8 << 30,
        attention_backend=os.environ.get("ATTENTION_BACKEND"),
        compilation_config={"cudagraph_capture_sizes": [1, 8, 32, 64]},  # meswitch's kernels for decoding take 64
        enable_lora=True,
        max_loras=max(experts for _, experts in KINDS),
        max_cpu_loras=16,
        max_lora_rank=8,
        worker_cls="meswitch.vllm.DeltaWorker",
        additional_config={"meswitch": settings},
    )
    loaded = NAMES[: max(experts for _, experts in KINDS)]
    experts = {name: LoRARequest(name, number, artifact) for number, name in enumerate(loaded, start=1)}

    def ask(requests: int, names: list[str], new: int) -> int:
        done = engine.generate(
            [{"prompt_token_ids": [5 + number] * PROMPT} for number in range(requests)],
            SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False),
            lora_request=[experts.get(names[number % len(names)]) for number in range(requests)],
            use_tqdm=False,
        )
        return sum(len(answer.outputs[0].token_ids) for answer in done)

    ask(len(loaded), loaded, 2)  # loads them
    print(json.dumps({"ready_s": round(time.perf_counter() - started, 1)}), flush=True)
    sys.stdin.readline()
    for requests, experts_asked in KINDS:
        names = NAMES[:experts_asked] or ["base"]
        row = measured(lambda new, r=requests, n=names: ask(r, n, new), requests)
        print(json.dumps({"engine": "vllm", "requests": requests, "experts": experts_asked} | row), flush=True)


def peers(base: Path, keep: Callable[[Row], None]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to("cuda").eval()

    def generate(requests: int) -> Callable[[int], Any]:
        ids = torch.full((requests, PROMPT), 7, device="cuda")
        options = {"do_sample": False, "pad_token_id": 2, "attention_mask": torch.ones_like(ids)}
        return lambda new: model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, **options)

    for requests in (1, 32):
        row = measured(generate(requests), requests)
        keep({"engine": "transformers generate", "requests": requests, "experts": 0} | row)
    try:
        from transformers import GenerationConfig

        def batched(new: int) -> Any:
            config = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=-1)
            return model.generate_batch(
                [[5 + number] * PROMPT for number in range(32)], generation_config=config, progress_bar=False
            )

        keep({"engine": "transformers continuous", "requests": 32, "experts": 0} | measured(batched, 32))
    except Exception as error:  # noqa: BLE001 - a peer that does not run here is told
        print(f"transformers' continuous batching: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()

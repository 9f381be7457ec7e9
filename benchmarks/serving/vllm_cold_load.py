"""What loading an expert costs those who are being answered: vLLM with and without the middleware that reads ahead.

    python benchmarks/serving/vllm_cold_load.py [--model mistral-7b] [--out results.json] [--quick]

One request streams from the base while an expert that the server does not know is loaded by vLLM's endpoint, some
times, from a directory of its own each time. Shown are the longest pause between two tokens of the stream without any
load and during the loads, and how long the loads took.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.serving.vllm_doc import pauses_table
from benchmarks.serving.vllm_server import about, serve_arguments, serving
from benchmarks.serving.vllm_shapes import SHAPES, write_artifact, write_config, write_tokenizer

MIDDLEWARE = "meswitch.vllm.middleware.Prefetch"


class Stream(threading.Thread):
    """When each token of one long answer came."""

    def __init__(self, port: int, tokens: int) -> None:
        super().__init__()
        self.port, self.tokens, self.times = port, tokens, list[float]()
        self.start()

    def run(self) -> None:
        from openai import OpenAI

        client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none")
        extra = {"ignore_eos": True}
        options = {"max_tokens": self.tokens, "temperature": 0, "stream": True, "extra_body": extra}
        for _ in client.completions.create(model="base", prompt="w1 w2 w3", **options):
            self.times.append(time.perf_counter())

    def longest(self, first: float, last: float) -> float:
        """The longest pause between two tokens that ends after `first` and begins before `last`, in ms."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return max(((b - a) * 1e3 for a, b in pairs if b > first and a < last), default=0.0)


def load(port: int, name: str, directory: Path) -> None:
    body = json.dumps({"lora_name": name, "lora_path": str(directory)}).encode()
    url = f"http://127.0.0.1:{port}/v1/load_lora_adapter"
    urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=600).read()


def measure(base: Path, adapter: Path, ahead: bool, work: Path, options: argparse.Namespace) -> dict:
    arguments = serve_arguments("meswitch", base, [adapter], 1, options)
    arguments += ["--middleware", MIDDLEWARE] if ahead else []
    with serving(arguments, work / f"{ahead}.log", options.patience) as (port, _):
        load(port, "first", shutil.copytree(adapter, work / f"{ahead}-first", copy_function=os.link))  # warms up
        stream = Stream(port, options.output_len)
        while len(stream.times) < 4:
            time.sleep(0.01)
        quiet, took = time.perf_counter(), []
        time.sleep(options.pause)
        loud = time.perf_counter()
        for i in range(options.repeat):
            directory = shutil.copytree(adapter, work / f"{ahead}-{i}", copy_function=os.link)
            begin = time.perf_counter()
            load(port, f"cold{i}", directory)
            took.append(time.perf_counter() - begin)
        end = time.perf_counter()
        if not stream.is_alive():
            raise SystemExit("the stream ended before the loads: give a longer --output-len")
        stream.join()
    pauses = stream.longest(quiet, loud), stream.longest(loud, end), sorted(took)[len(took) // 2] * 1e3
    names = "quiet_ms", "longest_ms", "load_ms"
    return {"read_ahead": ahead} | dict(zip(names, (round(value, 1) for value in pauses), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--layers", type=int, help="fewer layers of it")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="loads")
    parser.add_argument("--output-len", type=int, default=4000, help="tokens of the stream")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds of the stream before the loads")
    parser.add_argument("--patience", type=float, default=600)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve-args", nargs=argparse.REMAINDER, default=[], help="the rest of the line, for vLLM")
    options = parser.parse_args()
    options.base, options.deltas, options.concurrency, options.input_len, options.experts = None, [], [4], 16, [1]
    if options.quick:
        options.model, options.output_len, options.pause = "tiny", 900, 0.5
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    shape = SHAPES[options.model]
    shape["num_hidden_layers"] = options.layers or shape["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        base = write_config(work / "base", options.model)
        write_tokenizer(base, shape["vocab_size"])
        adapter = write_artifact(base, work / "delta", options.bits)
        rows = [measure(base, adapter, ahead, work, options) for ahead in (False, True)]
    print(pauses_table(rows))
    if options.out:
        options.out.write_text(json.dumps({"meta": about(options), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

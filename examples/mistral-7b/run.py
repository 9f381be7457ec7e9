"""The whole recipe: fetch or draw checkpoints, compress, verify, inspect, evaluate, merge, generate, serve.

    python examples/mistral-7b/run.py --device cuda                      the real family, from the hub
    python examples/mistral-7b/run.py --family llama-2-13b --device cuda
    python examples/mistral-7b/run.py --synthetic                        random weights of the true widths, one layer

Every step is the command that a user would type, and everything is written below --out. The real run needs
`pip install '.[lm-eval]'`, access to the models, and the disk and memory that README.md lists.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from calibration import write_calibration  # noqa: E402
from checkpoints import convert_if_pickled  # noqa: E402

from benchmarks.common.synthetic import write_family  # noqa: E402
from meswitch.cli.plan import plan_report  # noqa: E402
from meswitch.compression.options import Options  # noqa: E402
from meswitch.compression.plan import outline  # noqa: E402
from meswitch.family import Family  # noqa: E402
from meswitch.units import format_bytes  # noqa: E402

EXAMPLE = ROOT / "examples" / "family"  # its tokenizer and texts stand in where weights are random
TASKS = "gsm8k,mmlu"
QUESTION = "Ann has 3 boxes with 12 pens each and gives 7 pens away. How many pens are left?"
ANSWER_TOKENS = 8
TOKENS = 32000  # of both bases
SYNTHETIC_CALIBRATION_TOKENS = 2048


@dataclass(frozen=True)
class Step:
    """One command that ran: its time, and the most memory that its process had resident."""

    name: str
    seconds: float
    peak_bytes: int


def start(peak: Path, *command: str) -> subprocess.Popen[str]:
    """`meswitch ...` in a process whose peak resident bytes will be in the file `peak`."""
    words = [sys.executable, str(HERE / "peak.py"), str(peak), sys.executable, "-m", "meswitch", *command]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def in_a_process(*command: str) -> tuple[str, int]:
    """Run `meswitch ...`; its stdout and its peak resident bytes."""
    with tempfile.NamedTemporaryFile() as peak:
        process = start(Path(peak.name), *command)
        out, _ = process.communicate()
        if process.returncode:
            sys.exit(f"`meswitch {' '.join(command)}` failed; its message is above")
        return out, int(Path(peak.name).read_text())


class Recipe:
    """One family in one work directory. run: how a command is run (`in_a_process`)."""

    def __init__(self, name: str, out: Path, run: Callable[..., tuple[str, int]] = in_a_process) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.name, self.out, self.run = name, out, run
        self.file = out / "family.toml"
        shutil.copyfile(HERE / f"{name}.toml", self.file)
        self.family = Family.load(self.file)
        self.sources = {section.name: section.source or "" for section in self.family.expert}
        self.steps: list[Step] = []

    def meswitch(self, step: str, *command: str | Path) -> Any:
        """Run one command and note what it took; its JSON."""
        words = [str(word) for word in (*command, "--json")]
        print(f"$ meswitch {' '.join(words)}", flush=True)
        started = time.perf_counter()
        text, peak = self.run(*words)
        self.steps.append(Step(step, time.perf_counter() - started, peak))
        print(f"  {self.steps[-1].seconds:.1f} s, {format_bytes(peak)}", flush=True)
        return json.loads(text)

    def draw(self, layers: int, fields: dict[str, Any]) -> None:
        """Random checkpoints under the hub ids, where they go before the hub; texts of the example family."""
        ids = {"base": self.family.base.path, **self.sources}
        configs = {}
        for role, hub_id in ids.items():
            config = json.loads((HERE / "configs" / self.name / role / "config.json").read_text())
            own = fields | {"num_hidden_layers": layers}
            if "vocab_size" in fields:  # the base's; an expert keeps the number of tokens that it adds
                own["vocab_size"] += config["vocab_size"] - TOKENS
            configs[self.out / hub_id] = config | own
        write_family(configs, shard_bytes=600_000_000, tokenizer=EXAMPLE / "base")
        (self.out / "calibration").mkdir(exist_ok=True)
        for role, text in zip(self.sources, ("instruct", "code", "math"), strict=True):
            shutil.copyfile(EXAMPLE / "calibration" / f"{text}.jsonl", self.out / "calibration" / f"{role}.jsonl")

    def fetch(self) -> None:
        """Calibration texts, and safetensors of the checkpoints whose authors published pickles only."""
        for role, hub_id in self.sources.items():
            convert_if_pickled(hub_id, self.out / hub_id)
            write_calibration(role, self.out / "calibration" / f"{role}.jsonl")

    def compress(self, device: str, synthetic: bool) -> None:
        """All experts; of random ones only the first with its text, which at 7B's widths is the long part."""
        family = ("compress", "--family", self.file, "--device", device)
        if synthetic:
            first = self.family.expert[0].name
            tokens = ("--calibration-tokens", str(SYNTHETIC_CALIBRATION_TOKENS))
            self.meswitch(f"compress {first}, calibrated", *family, "--expert", first, *tokens)
            self.meswitch("compress the others, data-free", *family, "--calibration", "none")
        else:
            self.meswitch("compress", *family)

    def check(self) -> list[dict[str, Any]]:
        """Verify and inspect; each expert's bytes beside the planned ones."""
        base = self.family.base_source()
        rows = []
        for section in self.family.expert:
            delta = self.family.resolve(section.delta)
            self.meswitch(f"verify {section.name}", "verify", delta, "--base", base)
            seen = self.meswitch(f"inspect {section.name}", "inspect", delta)
            full = outline(self.family.source_of(section))
            row = {"expert": section.name, "vocab_size": seen["expert"]["vocab_size"]}
            row |= {"full_bytes": seen["expert"]["bytes"], "all_files": seen["bytes"]["total"]}
            row |= {"tensor_bytes": seen["bytes"]["tensors"], "unchanged": seen["tensors"]["same"]}
            row["planned_bytes"] = plan_report(outline(base), full, Options())["bytes"]["tensors"]
            row["bits_per_weight"] = seen["bits_per_weight"]["tensors"]
            rows.append(row)
        return rows

    def evaluate(self, tasks: str, questions: int | None) -> Any:
        """Base, full and compressed experts on tasks of lm-eval."""
        some = [] if questions is None else ["-n", str(questions)]
        return self.meswitch("eval", "eval", "--family", self.file, "--tasks", tasks, *some)

    def answer(self, dtype: str | None) -> dict[str, Any]:
        """One expert's answer three ways: generate, the merged checkpoint, the server. All three must be one."""
        expert = self.family.expert[-1]
        base, merged = self.family.base_source(), self.out / "merged" / expert.name
        shutil.rmtree(merged, ignore_errors=True)
        rounding = [] if dtype is None else ["--dtype", dtype]
        delta = self.family.resolve(expert.delta)
        self.meswitch("merge", "merge", "--base", base, "--delta", delta, "--out", merged, *rounding)
        alone = self.out / "merged.toml"
        alone.write_text(f'[base]\npath = "merged/{expert.name}"\n')
        ask = ("--max-tokens", str(ANSWER_TOKENS), QUESTION)
        ours = self.meswitch("generate", "generate", "--family", self.file, "--model", expert.name, *ask)
        full = self.meswitch("generate, merged", "generate", "--family", alone, "--model", "base", *ask)
        served = self.serve([section.name for section in self.family.expert])
        return {
            "expert": expert.name,
            "text": ours["text"],
            "tokens": ours["tokens"],
            "merged_agrees": full["tokens"] == ours["tokens"],
            "server_agrees": served[expert.name] == ours["text"],
            "served": served,
        }

    def serve(self, models: list[str]) -> dict[str, str]:
        """The same question to every expert of a running server: name -> answer."""
        command = ["serve", str(self.file), "--port", "0", "--json"]
        print(f"$ meswitch {' '.join(command)}", flush=True)
        started, peak = time.perf_counter(), self.out / "serve.peak"
        process = start(peak, *command)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                sys.exit("the server did not start; its message is above")
            answers = {model: ask(json.loads(line)["url"], model) for model in models}
        finally:
            process.terminate()
            process.wait(timeout=60)
        self.steps.append(Step("serve", time.perf_counter() - started, int(peak.read_text())))
        return answers


def ask(url: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": ANSWER_TOKENS}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body | {"temperature": 0}).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def main(arguments: list[str] | None = None, run: Callable[..., tuple[str, int]] = in_a_process) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("mistral-7b", "llama-2-13b"), default="mistral-7b")
    parser.add_argument("--out", type=Path, help="work directory; default: runs/FAMILY")
    parser.add_argument("--synthetic", action="store_true", help="random weights instead of the hub's")
    parser.add_argument("--layers", type=int, default=1, help="of the synthetic models")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=N", help="synthetic: another width")
    parser.add_argument("--device", default="cpu", help="of the compression: cpu or cuda")
    parser.add_argument("--tasks", default=TASKS, help="of the evaluation, which a synthetic run does not make")
    parser.add_argument("-n", type=int, help="questions a task; default: all")
    parser.add_argument("--json", type=Path, help="write the outcome here too")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    recipe = Recipe(options.family, options.out or ROOT / "runs" / options.family, run)
    fields = {field: int(value) for field, _, value in (word.partition("=") for word in options.set)}
    if options.synthetic:
        recipe.draw(options.layers, fields)
    else:
        recipe.fetch()
    drawn = time.perf_counter() - started
    recipe.compress(options.device, options.synthetic)
    experts = recipe.check()
    quality = None if options.synthetic else recipe.evaluate(options.tasks, options.n)
    # float32 merges lose nothing of the delta, so that random weights answer alike; a real one keeps its dtype
    answer = recipe.answer("float32" if options.synthetic else None)
    result = {
        "meta": {
            "date": datetime.now(UTC).date().isoformat(),
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "family": options.family,
        "synthetic": {"layers": options.layers, "calibration_tokens": SYNTHETIC_CALIBRATION_TOKENS, **fields}
        if options.synthetic
        else None,
        "fetch_or_draw_seconds": drawn,
        "seconds": time.perf_counter() - started,
        "peak_bytes": max(step.peak_bytes for step in recipe.steps),
        "steps": [asdict(step) for step in recipe.steps],
        "experts": experts,
        "answer": answer,
        "quality": quality,
    }
    print(f"in all {result['seconds']:.0f} s, at most {format_bytes(result['peak_bytes'])}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()

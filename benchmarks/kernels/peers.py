"""Decode steps beside others' kernels: 2-bit deltas by humming and gemlite on top of cuBLAS, vLLM's LoRA operators.

PYTHONPATH=src python benchmarks/kernels/peers.py --out benchmarks/results/ops-peers-h100.json

Steps are those of `decode.py`: all linears of a model in one CUDA graph, eight layers with weights of their own.
All ways of a step are replayed in turn. Tokens come sorted by expert, so that nobody has to gather them.

- `base`: cuBLAS. `meswitch`: one fused launch a linear; its `delta_ms` is the delta kernel alone.
- `humming`, with several experts `humming indexed` and `humming grouped`: the schedules that it chooses for the step.
  Deltas are as large as ours but for salient channels, their levels -2 to 1. The base is added by cuBLAS (`addmm`).
- `gemlite`: likewise, one launch for each expert, its fast autotuning.
- `vllm lora16`, `vllm lora64`: the base, then `lora_shrink` and `lora_expand` with as many adapters as the step has.

humming compiles with nvcc or NVRTC while this runs. What is not installed (`pip install humming-kernels gemlite vllm`)
or fails is reported and left out.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch.ops import expert_linear, fused_linear

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.kernels.decode import DEPTH, SLOTS, inputs, outputs
from benchmarks.kernels.peer_kernels import BF16, PEERS, Humming, Step, compiled_only, ways
from benchmarks.kernels.shapes import MODELS, Layer, delta_bytes, random_layer
from benchmarks.kernels.timing import copy_gb_s, graph_of, in_turn_ms, measured_on

MODEL = "mistral-7b"
POINTS = [(1, 1), (8, 4), (32, 1), (32, 16), (8, 1), (32, 4), (32, 8)]  # tokens, experts
TOLERANCE = 3e-2  # gemlite adds up to 64 partial sums in bfloat16
Call = Callable[[int], object]


@dataclass
class Report:
    """What goes into the file. check, rows, failures: a line for each."""

    out: Path
    meta: dict
    check: list[dict] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """What it returns; where it fails None, and a line."""
        try:
            found = function()
            torch.cuda.synchronize()
        except Exception as failure:  # noqa: BLE001 - other people's code
            said = f"{type(failure).__name__}: {str(failure)[:500]}"
            self.failures.append({"what": what, "error": said})
            print(f"LEFT OUT {what}: {said}", flush=True)
            return None
        return found

    def write(self) -> None:
        found = {name: getattr(self, name) for name in ("meta", "check", "rows", "failures")}
        self.out.write_text(json.dumps(found, indent=1) + "\n")


def calls(layers: list[Layer], peers: dict[str, list], step: Step, report: Report) -> dict[str, dict[str, Call]]:
    """Of each way: `ms`, all that linear i takes; `delta_ms`, its deltas alone."""
    x, y = inputs(layers, step.tokens), outputs(layers, step.tokens)
    tensors = [(x[layer.weight.shape[1]], layer.weight.T, y[layer.weight.shape[0]]) for layer in layers]

    def base(i: int) -> Tensor:
        return torch.mm(*tensors[i][:2], out=tensors[i][2])

    def fused(i: int) -> Tensor:
        return fused_linear(tensors[i][0], layers[i].weight, layers[i].deltas, step.routing)

    def delta(i: int) -> Tensor:
        return expert_linear(tensors[i][2], tensors[i][0], layers[i].deltas, step.routing)

    found: dict[str, dict[str, Call]] = {"base": {"ms": base}, "meswitch": {"ms": fused, "delta_ms": delta}}
    for peer, own in peers.items():
        for way, kind in ways(peer, step).items():
            products = report.attempt(way, lambda own=own, kind=kind: [linear.product(step, kind) for linear in own])
            if products is None:
                continue

            def alone(i: int, products=products) -> Tensor:
                return products[i](tensors[i][0], tensors[i][2])

            def before(i: int, alone=alone) -> Tensor:
                return alone(i).addmm_(*tensors[i][:2])

            def after(i: int, alone=alone) -> Tensor:
                base(i)
                return alone(i)

            found[way] = {"ms": after} if peer.startswith("vllm") else {"ms": before, "delta_ms": alone}
    return found


def check(peer: str, steps: list[Step], found: dict[Step, dict], report: Report) -> None:
    """Against fp64 on what the peer stores, in one linear; a way that is wrong is not measured."""
    rows, width = MODELS[MODEL][1]["o"]
    linear = report.attempt(f"{peer} for a check", lambda: PEERS[peer]("o", rows, width))
    dense = report.attempt(f"{peer} as a matrix", lambda: linear.dense())

    def error(step: Step, kind: str) -> float:
        x, y = torch.randn(step.tokens, width, **BF16), torch.zeros(step.tokens, rows, **BF16)
        got = linear.product(step, kind)(x, y).double()
        expected = torch.cat([x[part].double() @ dense[e].double().T for e, part in enumerate(step.parts)])
        return ((got - expected).norm() / expected.norm()).item()

    for step in steps:
        for way, kind in ways(peer, step).items():
            value = report.attempt(f"{way} checked", lambda step=step, kind=kind: error(step, kind))
            row = {"way": way, "tokens": step.tokens, "experts": step.experts, "error": value}
            report.check.append(row | {"pass": value is not None and value <= TOLERANCE})
            if not report.check[-1]["pass"]:
                print(f"FAIL {row}", flush=True)
                found[step].pop(way, None)


def point(layers: list[Layer], found: dict[str, dict[str, Call]], step: Step, report: Report) -> None:
    """Replay a step's ways in turn; a row and a line for each."""
    depth, shapes = MODELS[MODEL][0], MODELS[MODEL][1].values()
    order = [i % len(layers) for i in range(depth * len(shapes))]
    graphs = {}
    for way, name in ((way, name) for way, parts in found.items() for name in parts):
        call, what = found[way][name], f"{way} {name} at {step}"
        graph = report.attempt(what, lambda call=call: graph_of(lambda: [call(i) for i in order]))
        if graph:
            graphs[way, name] = graph
    times = dict(zip(graphs, in_turn_ms(list(graphs.values()), 7), strict=True))
    read = sum(2 * math.prod(shape) for shape in shapes) * depth
    packed = sum(delta_bytes(*shape, 2) for shape in shapes) * depth * step.experts
    salient = sum(rows * (width // 512) * 2 for rows, width in shapes) * depth * step.experts
    for way in found:
        ms, delta_ms = times.get((way, "ms")), times.get((way, "delta_ms"))
        size = packed if way == "meswitch" else packed - salient
        row = {
            "model": MODEL,
            "tokens": step.tokens,
            "experts": step.experts,
            "way": way,
            "ms": ms,
            "delta_ms": delta_ms,
            "ratio_to_base": ms / times["base", "ms"] if ms else None,
            "gb_s": size / delta_ms / 1e6 if delta_ms else None,
            "floor_ms": (read + packed) / report.meta["copy_gb_s"] / 1e6,
        }
        report.rows.append(row)
        alone = f", deltas alone {delta_ms:.2f} ms, {row['gb_s']:.0f} GB/s" if delta_ms else ""
        print(
            f"{step.tokens:2} tokens {step.experts:2} experts {way:15} {ms or math.nan:6.2f} ms "
            f"(floor {row['floor_ms']:.2f}){alone}",
            flush=True,
        )


def _meta() -> dict:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = "torch", "triton", "humming-kernels", "gemlite", "vllm"
    return measured_on() | {
        "versions": {package: installed(package) for package in packages},
        "layers_of_their_own": DEPTH,
        "copy_gb_s": max(copy_gb_s().values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--workers", type=int, default=15, help="threads that compile")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="only these")
    args = parser.parse_args()
    started = time.perf_counter()
    report = Report(args.out, _meta())
    print(report.meta, flush=True)

    def stage(name: str) -> None:
        report.write()
        print(f"-- {name} at {time.perf_counter() - started:.0f} s", flush=True)

    shapes = MODELS[MODEL][1]
    layers = [random_layer(name, *shape, 2, SLOTS) for _ in range(DEPTH) for name, shape in shapes.items()]
    peers = {}
    for peer in args.peers:
        build = PEERS[peer]
        linears = report.attempt(peer, lambda build=build: [build(own.name, *own.weight.shape) for own in layers])
        if linears:
            peers[peer] = linears
    stage("weights drawn")
    steps = [Step(*about) for about in POINTS]
    if "humming" in peers:
        report.attempt(
            "humming compiled", lambda: Humming.compile(peers["humming"][: len(shapes)], steps, args.workers)
        )
    stage("humming compiled")
    found = {step: calls(layers, peers, step, report) for step in steps}
    with compiled_only(args.workers):
        for way, parts in (item for step in steps for item in found[step].items()):
            for call in parts.values() if not way.startswith("humming") else ():
                report.attempt(f"{way} compiled", lambda call=call: [call(i) for i in range(len(shapes))])
    stage("Triton's kernels compiled")
    for peer in peers:
        check(peer, steps, found, report)
    stage("checked")
    for step in steps:
        report.attempt(str(step), lambda step=step: point(layers, found[step], step, report))
        stage(f"{step.tokens} tokens of {step.experts} experts")


if __name__ == "__main__":
    main()

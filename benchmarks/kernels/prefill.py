"""Prefill on a GPU: the linears of a layer for thousands of tokens of one or several experts, against the base alone.

PYTHONPATH=src python benchmarks/kernels/prefill.py --out FILE
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.kernels import prefill_check
from benchmarks.kernels import prefill_paths as paths
from benchmarks.kernels.shapes import DEVICE, MODELS, Layer, random_layer
from benchmarks.kernels.timing import copy_gb_s, graph_ms, graph_of, in_turn_ms
from meswitch.ops.layout import Variant
from meswitch.ops.prefill import MERGED
from meswitch.ops.routing import PrefillRouting
from meswitch.ops.triton.ahead import Compilation, compile_ahead, decode_job, merge_job, product_job
from meswitch.ops.triton.items import MERGE_TILES
from meswitch.ops.triton.items import MergeTile as Tile
from meswitch.ops.triton.merge import merge_rows as launch

MODEL, LAYERS, TOKENS = "mistral-7b", 3, 4096
REPEATS = 15
SHAPES = MODELS[MODEL][1]
EQUAL = {experts: [TOKENS // experts] * experts for experts in (1, 2, 4, 8)}
SKEWED = {2: [3584, 512], 4: [2560, 1024, 384, 128], 8: [2048, 1024, 512, 192, 128, 96, 64, 32]}
CROSSOVER = [(tokens, experts) for tokens in (64, 128, 192, 256, 512, 1024, 2048, 3072) for experts in (1, 4)]
TILES = [Tile(8, 4), Tile(8, 8), Tile(8, 8, 64), Tile(16, 8), Tile(16, 8, 80), Tile(16, 8, 64), Tile(32, 8), Tile(4, 4)]


def wanted() -> list[Compilation]:
    """What to compile beforehand."""
    found = [job for case in prefill_check.cases() for job in prefill_check.wanted(case)]
    v = Variant(two=True, one=False, group=128, salient=16)
    for experts in range(1, MERGED + 1):
        found += [merge_job(*SHAPES["qkv"], v, torch.bfloat16, experts, tile) for tile in TILES]
    found += [product_job(*shape, v, torch.bfloat16, False) for shape in SHAPES.values()]
    for lengths in [*EQUAL.values(), *SKEWED.values(), *([tokens] * experts for tokens, experts in _crossovers())]:
        for own_from in (paths.NEVER, None):
            short = PrefillRouting.build(paths.token_slots(lengths), own_from=own_from).short
            if short is not None:
                found += [decode_job(*s, v, torch.bfloat16, short.likely, short.piece) for s in SHAPES.values()]
    return found


def merge_speed(layers: list[Layer], copy: float) -> list[dict]:
    """The merge kernel alone, every tile; the fastest is used from here on."""
    found = []
    for experts in (1, 4):
        slots = torch.arange(experts, dtype=torch.int32, device=DEVICE)
        for tile in TILES:
            moved, ms = 0.0, 0.0
            for name in ("gate_up", "down"):
                same = [layer for layer in layers if layer.name == name]
                rows, width = same[0].weight.shape
                out = torch.empty(experts, rows, width, dtype=torch.bfloat16, device=DEVICE)

                def run(same=same, out=out, rows=rows, slots=slots, tile=tile) -> None:
                    for layer in same:
                        d = layer.deltas
                        launch(out, layer.weight, d.arena, d.table, slots, 0, rows, d.variant, tile)

                ms += graph_ms(run, 5) / len(same)
                moved += rows * width * (2 + experts * (2 + 2 / 8 + 2 / 128)) / 1e6
            row = {"experts": experts, **dataclasses.asdict(tile), "ms": ms, "gb_s": moved / ms}
            found.append(row | {"share_of_copy": moved / ms / copy})
            print(f"merge E{experts} {tile}: {ms:.3f} ms, {moved / ms / copy:.0%} of copy", flush=True)
        best = min((row for row in found if row["experts"] == experts), key=lambda row: row["ms"])
        for count in {1: (1,), 4: (2, 3, 4)}[experts]:
            MERGE_TILES[count] = Tile(best["rows"], best["warps"], best["registers"])
    return found


def measure(label: dict, candidates: dict[str, paths.Path], base_path: paths.Path) -> list[dict]:
    """Milliseconds a layer of every candidate; one that fails is reported and left out."""
    graphs = {"base": graph_of(base_path)}
    for name, path in candidates.items():
        try:
            graphs[name] = graph_of(path)
        except Exception as failure:  # noqa: BLE001 - candidates
            print(f"{name}: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
    times = dict(zip(graphs, (ms / LAYERS for ms in in_turn_ms(list(graphs.values()), REPEATS)), strict=True))
    base_ms, found = times.pop("base"), []
    for name, ms in times.items():
        found.append(label | {"path": name, "ms": ms, "base_ms": base_ms, "ratio_to_base": ms / base_ms, "best": False})
    if found:
        min(found, key=lambda row: row["ms"])["best"] = True
    text = "  ".join(f"{'*' if r['best'] else ''}{r['path']} {r['ms']:.3f} ({r['ratio_to_base']:.2f})" for r in found)
    shape = f"b{label['bits']} T{label['tokens']} E{label['experts']} {label['spread']}"
    print(f"{shape}: base {base_ms:.3f}  {text}", flush=True)
    torch.cuda.empty_cache()
    return found


def prefill(copy_gb_s: float, layers: list[Layer] | None = None, bits: int = 2) -> list[dict]:
    """Every way at 4,096 tokens, then what each costs for fewer."""
    layers = layers or draw_layers(bits)
    found = []
    for spread, by_experts in (("equal", EQUAL), ("skewed", SKEWED)):
        for experts, lengths in by_experts.items():
            if bits != 2 and (spread, experts) not in {("equal", 1), ("equal", 4)}:
                continue
            found += measure(_label(bits, TOKENS, experts, spread), *_every_way(layers, lengths, spread, bits))
    if bits != 2:
        return found
    for tokens, experts in _crossovers():
        lengths = [tokens] * experts
        x, y = _buffers(sum(lengths))
        slots = paths.token_slots(lengths)
        ways = {
            "restoring": paths.restoring(layers, x, y, lengths),
            "merging": paths.package(layers, x, slots, paths.ALWAYS, restore=False),
        }
        if tokens <= 512:
            ways["decode_kernel"] = paths.package(layers, x, slots, paths.NEVER)
        found += measure(_label(bits, sum(lengths), experts, "equal"), ways, paths.base(layers, x, y))
    return found


def _crossovers() -> list[tuple[int, int]]:
    """Tokens of each expert, experts: fewer tokens than the steps before have."""
    return [(tokens, experts) for tokens, experts in CROSSOVER if tokens * experts < TOKENS]


def draw_layers(bits: int) -> list[Layer]:
    return [random_layer(name, *shape, bits, 8) for _ in range(LAYERS) for name, shape in SHAPES.items()]


def _every_way(
    layers: list[Layer], lengths: list[int], spread: str, bits: int
) -> tuple[dict[str, paths.Path], paths.Path]:
    x, y = _buffers(TOKENS)
    slots = paths.token_slots(lengths)
    base = paths.base(layers, x, y)
    ways = {"package": paths.package(layers, x, slots)}
    if bits != 2:
        return ways, base
    ways["restoring"] = paths.restoring(layers, x, y, lengths)
    ways["merging"] = paths.package(layers, x, slots, restore=False)
    ways["grouped"] = paths.grouped(layers, x, lengths)
    if len(lengths) > 1:
        ways["decode_kernel"] = paths.package(layers, x, slots, paths.NEVER)
    if spread == "equal" and len(lengths) in (1, 4):
        ways["two_products"] = paths.two_products(layers, x, y, lengths)
    if spread == "equal" and len(lengths) == 4:
        ways["scattered_tokens"] = paths.package(layers, x, slots[::3] + slots[1::3] + slots[2::3])
    return ways, base


def _buffers(tokens: int) -> tuple[paths.Buffers, paths.Buffers]:
    x = {w: torch.randn(tokens, w, device=DEVICE).bfloat16() for w in {w for _, w in SHAPES.values()}}
    return x, {r: torch.empty(tokens, r, dtype=torch.bfloat16, device=DEVICE) for r in {r for r, _ in SHAPES.values()}}


def _label(bits: int, tokens: int, experts: int, spread: str) -> dict:
    return {"model": MODEL, "bits": bits, "tokens": tokens, "experts": experts, "spread": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--workers", type=int, default=14, help="threads that compile")
    args = parser.parse_args()
    started, result = time.perf_counter(), {}

    def stage(name: str) -> None:
        args.out.write_text(json.dumps(result, indent=1))
        print(f"-- {name} at {time.perf_counter() - started:.0f} s", flush=True)

    print(f"{compile_ahead(wanted(), args.workers)} kernels compiled", flush=True)
    stage("compiled")
    result["check"] = prefill_check.check()
    copy = max(copy_gb_s().values())
    result["meta"] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_s": copy}
    stage(f"checked, copy {copy:.0f} GB/s")
    layers = draw_layers(2)
    result["merge"] = merge_speed(layers, copy)
    stage("merge kernel")
    result["prefill"] = prefill(copy, layers)
    stage("2 bits")
    del layers
    result["prefill"] += prefill(copy, bits=4)
    stage("4 bits")


if __name__ == "__main__":
    main()

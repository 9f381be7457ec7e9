"""The expert op on a GPU: correctness, decode steps against the bandwidth floor, tiles.

PYTHONPATH=src python benchmarks/ops.py --quick --out FILE
"""

import argparse
import dataclasses
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

import ops_check
import ops_sweep
from meswitch.ops import Routing, expert_linear
from meswitch.ops.triton_launch import choose, constants, decode
from ops_models import DEVICE, MODELS, Layer, delta_bytes, random_layer, spread
from ops_timing import compile_all, copy_gb_s, graph_ms, read_gb_s

QUICK_POINTS = [(1, 1), (4, 4), (8, 1), (8, 4), (8, 8), (16, 1), (16, 4), (16, 16), (32, 1), (32, 4), (32, 16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, few points, the sweep over tiles")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--no-sweep", action="store_true")
    args = parser.parse_args()
    started = time.perf_counter()
    result: dict = {"meta": _meta()}

    def stage(name: str) -> None:
        args.out.write_text(json.dumps(result, indent=1))
        print(f"-- {name} at {time.perf_counter() - started:.0f} s", flush=True)

    depth, shapes = MODELS["mistral-7b"]
    wanted = [ops_check.wanted(case) for case in ops_check.cases()] + _wanted_steps(shapes)
    if not args.no_sweep:
        wanted += ops_sweep.wanted(shapes)
    print("\n".join(compile_all(wanted, args.workers)))
    stage("compiled")
    result["check"] = ops_check.check()
    stage("checked")
    copy, read = copy_gb_s(), read_gb_s()
    result["meta"] |= {"copy_gb_s": copy, "read_gb_s": read}
    print(f"copy {copy:.0f} GB/s, read {read:.0f} GB/s")
    layers = [[random_layer(n, *shape, 2, 16) for n, shape in shapes.items()] for _ in range(depth)]
    torch.cuda.synchronize()
    stage("weights drawn")
    result["decode"] = [decode_point("mistral-7b", layers, batch, experts, copy) for batch, experts in QUICK_POINTS]
    stage("decode steps")
    if not args.no_sweep:
        result["sweep"] = ops_sweep.sweep(layers, copy)
        stage("swept")


def decode_point(model: str, layers: list[list[Layer]], batch: int, experts: int, copy: float) -> dict:
    """One decode step over all linears: base alone, delta alone, both in turn, both at once; milliseconds."""
    routing = Routing.build(spread("distinct", batch, experts), DEVICE)
    x = {
        w: torch.randn(batch, w, device=DEVICE).bfloat16()
        for w in {d.in_features for row in layers for d in _deltas(row)}
    }
    y = {r: torch.zeros(batch, r, device=DEVICE).bfloat16() for r in {d.rows for row in layers for d in _deltas(row)}}
    flat = [layer for row in layers for layer in row]
    share = {w: value[: max(1, batch // experts)].contiguous() for w, value in x.items()}
    side = torch.cuda.Stream()

    def base(layer: Layer, x=x) -> None:
        tokens = x[layer.weight.shape[1]]
        torch.mm(tokens, layer.weight.T, out=y[layer.weight.shape[0]][: len(tokens)])

    def delta(layer: Layer, early: bool = False) -> None:
        d, v = layer.deltas, layer.deltas.variant
        config = dataclasses.replace(
            choose(d.rows, d.in_features, routing.slots.numel(), routing.max_tokens), early=early
        )
        decode(
            y[d.rows],
            x[d.in_features],
            d.arena,
            d.table,
            d.arrived,
            routing.slots,
            routing.starts,
            routing.order,
            routing.max_tokens,
            v.two,
            v.one,
            v.group,
            v.salient,
            config,
        )

    def both() -> None:
        for layer in flat:
            base(layer)
            expert_linear(y[layer.weight.shape[0]], x[layer.weight.shape[1]], layer.deltas, routing)

    def both_early() -> None:
        for layer in flat:
            base(layer)
            delta(layer, early=True)

    def beside() -> None:  # wrong sums: what the overlap of the two kernels would be worth
        current = torch.cuda.current_stream()
        for layer in flat:
            side.wait_stream(current)
            with torch.cuda.stream(side):
                delta(layer)
            base(layer)
            current.wait_stream(side)

    base_bytes = sum(layer.weight.numel() * 2 for layer in flat)
    expert_bytes = sum(delta_bytes(*layer.weight.shape, 2) for layer in flat)
    floor = (base_bytes + experts * expert_bytes) / copy / 1e6
    times = {
        "base_ms": graph_ms(lambda: [base(layer) for layer in flat]),
        "delta_ms": graph_ms(lambda: [delta(layer) for layer in flat]),
        "ms": graph_ms(both),
    }
    for name, function in (("early_ms", both_early), ("beside_ms", beside)):
        try:
            times[name] = graph_ms(function)
        except Exception as failure:  # noqa: BLE001 - experiments
            print(f"{name}: {type(failure).__name__}: {str(failure)[:150]}")
            times[name] = float("nan")
    merged = experts * graph_ms(lambda: [base(layer, share) for layer in flat])
    gb_s = experts * expert_bytes / times["delta_ms"] / 1e6
    row = {
        "model": model,
        "bits": 2,
        "batch": batch,
        "experts": experts,
        "spread": "distinct",
        **times,
        "floor_ms": floor,
        "ratio_to_floor": times["ms"] / floor,
        "delta_gb_s": gb_s,
        "ratio_to_base": times["ms"] / times["base_ms"],
        "speedup_vs_merged": merged / times["ms"],
    }
    print(
        f"B{batch:<2} E{experts:<2} base {times['base_ms']:.2f} delta {times['delta_ms']:.2f} "
        f"({gb_s / copy:.0%} of copy) "
        f"both {times['ms']:.2f} early {times['early_ms']:.2f} beside {times['beside_ms']:.2f} floor {floor:.2f} "
        f"ratio {times['ms'] / floor:.2f} merged {merged:.2f} = {merged / times['ms']:.1f}x",
        flush=True,
    )
    return row


def _deltas(row: list[Layer]) -> list:
    return [layer.deltas for layer in row]


def _wanted_steps(shapes: dict[str, tuple[int, int]]) -> list[tuple[tuple, dict]]:
    found = []
    for batch, experts in QUICK_POINTS:
        routing = Routing.build(spread("distinct", batch, experts))
        for rows, width in shapes.values():
            config = choose(rows, width, routing.slots.numel(), routing.max_tokens)
            for early in (False, True):
                fixed = constants(dataclasses.replace(config, early=early), rows, width, True, False, 128, 16)
                found.append(((torch.bfloat16, rows, width, config.split), fixed))
    return found


def _meta() -> dict:
    return {
        "card": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }


if __name__ == "__main__":
    main()

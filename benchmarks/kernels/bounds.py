"""Every kernel once on sizes that are no multiples of its tiles, for a tool that watches memory accesses.

    python benchmarks/kernels/bounds.py                                             compiles, compares with the CPU
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/kernels/bounds.py

Without torch's cache each tensor is an allocation of its own, so that an access beyond it is seen. Tensors are made on
the CPU and copied: torch's own kernels would only cost time.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from meswitch.ops import PrefillRouting, Routing, SlotLinear, expert_prefill, fused_linear
from meswitch.ops.linear import embedding_rows, expert_linear
from meswitch.ops.triton import on_hopper

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.kernels.shapes import random_delta

SIZES = [(37, 100, 16), (200, 1100, 128), (130, 2100, 0)]  # rows, in_features, group size (0: whole rows)
SLOTS = [0, 1, 0, 2, -1, 3, 0, 0, 0, 0, 0, 0, 0]


def layers(rows: int, width: int, group: int, bits: tuple[int, ...] = (1, 2, 3, 4)) -> tuple[SlotLinear, SlotLinear]:
    """Experts, one a width, on the CPU and on the GPU."""
    deltas = [random_delta(rows, width, width_in_bits, group or None, 2, "cpu") for width_in_bits in bits]
    own = SlotLinear.build(deltas, "cpu")
    moved = [tensor.cuda() for tensor in (own.arena, own.table, own.arrived)]
    return own, replace(own, arena=moved[0], table=moved[1], arrived=moved[2])


def compare(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = float((found.cpu().double() - wanted.double()).norm() / wanted.double().norm())
    print(f"{time.strftime('%X')} {name}: relative error {error:.1e}", flush=True)
    assert error < 1e-2, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("fused", "decode", "prefill", "rows", "product"))
    only = parser.parse_args().only
    torch.manual_seed(0)
    for rows, width, group in SIZES:
        own, moved = layers(rows, width, group)
        x = torch.randn(len(SLOTS), width).bfloat16()
        weight = (torch.randn(rows, width) * 0.05).bfloat16()
        size = f"{rows} x {width}"
        routing, device = Routing.build(SLOTS), Routing.build(SLOTS, "cuda")
        gpu_x, gpu_weight = x.cuda(), weight.cuda()
        if only in (None, "fused"):
            wanted = fused_linear(x, weight, own, routing, backend="cpu")
            compare(f"fused {size}", fused_linear(gpu_x, gpu_weight, moved, device), wanted)
        if only in (None, "decode"):
            wanted = expert_linear(torch.zeros(len(x), rows).bfloat16(), x, own, routing, "cpu")
            y = torch.zeros(len(x), rows).bfloat16().cuda()
            compare(f"decode {size}", expert_linear(y, gpu_x, moved, device), wanted)
        if only in (None, "prefill"):
            owners = [slot for slot in range(4) for _ in range(8)]
            many = torch.randn(len(owners), width).bfloat16()
            merged = PrefillRouting.build(owners, own_from=1), PrefillRouting.build(owners, "cuda", own_from=1)
            wanted = expert_prefill(many, weight, own, merged[0], backend="reference")
            compare(f"merge {size}", expert_prefill(many.cuda(), gpu_weight, moved, merged[1]), wanted)
        if only in (None, "rows"):
            ids, slots = torch.tensor([0, 5, rows - 1, 7]), torch.tensor([0, 1, 3, -1], dtype=torch.int32)
            wanted = embedding_rows(ids, weight, own, slots, backend="reference")
            compare(f"rows {size}", embedding_rows(ids.cuda(), gpu_weight, moved, slots.cuda()), wanted)
    if only in (None, "product") and on_hopper(torch.device("cuda")):
        product()


def product() -> None:
    """Whole tiles of the weight, but segments that end within one of tokens."""
    own, moved = layers(256, 512, 128, bits=(2, 2, 2, 2))
    owners = [slot for slot, length in enumerate((40, 300, 17)) for _ in range(length)]
    x, weight = torch.randn(len(owners), 512).bfloat16(), (torch.randn(256, 512) * 0.05).bfloat16()
    host, device = PrefillRouting.build(owners, own_from=1), PrefillRouting.build(owners, "cuda", own_from=1)
    wanted = expert_prefill(x, weight, own, host, backend="reference")
    compare("product 256 x 512", expert_prefill(x.cuda(), weight.cuda(), moved, device), wanted)


if __name__ == "__main__":
    main()

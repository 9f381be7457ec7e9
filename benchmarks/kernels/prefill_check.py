"""Numbers before timings: merged prefill and embeddings against fp64 on the GPU."""

import torch

from benchmarks.kernels.check import judged
from benchmarks.kernels.shapes import DEVICE, random_delta
from meswitch.ops import SlotLinear
from meswitch.ops.layout import Variant
from meswitch.ops.linear import embedding_rows
from meswitch.ops.prefill import SCRATCH, expert_prefill
from meswitch.ops.routing import PrefillRouting
from meswitch.ops.triton.ahead import Compilation, decode_job, embedding_job, merge_job

STEPS = {
    "one": [0] * 512,
    "mixed": [1] * 400 + [-1] * 50 + [0] * 390 + [2] * 70 + [3] * 3,
    "scattered": [0, 1, -1, 2] * 400,
    "short": [0] * 130 + [1] * 9 + [-1] * 5,
}


def cases() -> list[dict]:
    """bits 0: experts of 1 to 4 bits, one of them unchanged."""
    case = {"rows": 2048, "width": 2048, "bits": 2, "group": 128, "salient": 4, "dtype": torch.bfloat16}
    case |= {"step": "mixed", "scratch": SCRATCH}
    found = [case | {"bits": b, "rows": r, "width": w} for b in (1, 2, 3, 4) for r, w in ((2048, 2048), (1000, 3000))]
    found += [case | {"step": step} for step in STEPS]
    found += [case | {"group": group} for group in (16, 512, None)]
    found += [case | {"salient": 0}, case | {"bits": 0}, case | {"dtype": torch.float16}, case | {"scratch": 1 << 22}]
    found += [case | {"rows": 28672, "width": 4096}]
    return found


def wanted(case: dict) -> list[Compilation]:
    """What to compile for a case."""
    bits, shape = case["bits"], (case["rows"], case["width"])
    two, one = (True, True) if bits == 0 else (bits > 1, bits % 2 == 1)
    v = Variant(two, one, case["group"] or 0, 16 if case["salient"] else 0)
    routing, about = PrefillRouting.build(STEPS[case["step"]]), (*shape, v, case["dtype"])
    jobs = [embedding_job(*about, extra=False)]
    if routing.short is not None:
        jobs.append(decode_job(*about, routing.short.likely, routing.short.piece))
    if routing.own:
        jobs.append(merge_job(*about, len(routing.own)))
    return jobs


def errors(case: dict) -> dict[str, float]:
    """Relative errors of the layer's output and of embedding rows."""
    torch.manual_seed(0)
    shape, slots = (case["rows"], case["width"]), STEPS[case["step"]]
    widths = [1, 2, 3, 4] if case["bits"] == 0 else [case["bits"]] * 4
    deltas = [random_delta(*shape, bits, case["group"], case["salient"]) for bits in widths]
    if case["bits"] == 0:
        deltas[1] = None
    layer = SlotLinear.build(deltas, DEVICE)
    x = torch.randn(len(slots), shape[1], device=DEVICE).to(case["dtype"])
    weight = (torch.randn(shape, device=DEVICE) * 0.02).to(case["dtype"])
    bias = torch.randn(shape[0], device=DEVICE).to(case["dtype"])
    ids = torch.randint(0, shape[0], (len(slots),), device=DEVICE)
    owners = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    y = expert_prefill(x, weight, layer, PrefillRouting.build(slots, DEVICE), bias, scratch=case["scratch"])
    merged = expert_prefill(
        x, weight, layer, PrefillRouting.build(slots, DEVICE), bias, scratch=case["scratch"], restore=False
    )
    rows = embedding_rows(ids, weight, layer, owners)
    expected = torch.zeros_like(y, dtype=torch.float64)
    expected_rows = weight[ids].double()
    for slot in set(slots):
        mine = owners == slot
        merged = weight.double()
        if slot >= 0 and deltas[slot] is not None:
            merged += deltas[slot].dequantize()
        expected[mine] = x[mine].double() @ merged.T + bias.double()
        expected_rows[mine] = merged[ids[mine]]
    return {
        "prefill": ((y.double() - expected).norm() / expected.norm()).item(),
        "merging": ((merged.double() - expected).norm() / expected.norm()).item(),
        "embedding": ((rows.double() - expected_rows).norm() / expected_rows.norm()).item(),
    }


def check() -> list[dict]:
    return judged(cases(), errors)

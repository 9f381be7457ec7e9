"""Numbers before timings: the kernels against fp64 on the GPU."""

from collections.abc import Callable

import torch

from benchmarks.kernels.shapes import DEVICE, random_delta, spread
from meswitch.ops import Routing, SlotLinear, expert_linear, fused_linear
from meswitch.ops.layout import Variant
from meswitch.ops.routing import BASE, bucket
from meswitch.ops.triton.ahead import Compilation, decode_job, fused_job
from meswitch.ops.triton.items import choose_fused

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
SPREADS = ("identical", "distinct", "uniform", "zipf", "skewed")


def cases() -> list[dict]:
    """Every bit width at even and odd sizes, every spread, group sizes, salient counts, both types; both kernels."""
    base = {
        "rows": 4096,
        "width": 4096,
        "bits": 2,
        "group": 128,
        "salient": 4,
        "spread": "uniform",
        "tokens": 12,
        "experts": 4,
        "dtype": torch.bfloat16,
        "mean": 0.0,
    }
    found = [
        base | {"bits": bits, "rows": rows, "width": width}
        for bits in (1, 2, 3, 4)
        for rows, width in ((4096, 4096), (1000, 3000))
    ]
    found += [base | {"spread": name, "tokens": tokens, "experts": 8} for name in SPREADS for tokens in (8, 32, 64)]
    found += [base | {"group": group} for group in (16, 512, None)]
    found += [base | {"salient": salient} for salient in (0, 1, 8)]
    found += [base | {"dtype": torch.float16, "bits": bits} for bits in (1, 2)]
    found += [base | {"bits": 0}]  # experts of 1-4 bits and an unchanged one
    found += [base | {"mean": 10.0}, base | {"tokens": 1, "experts": 1}, base | {"rows": 28672, "experts": 2}]
    return [case | {"kernel": kernel} for case in found for kernel in ("decode", "fused")]


def token_slots(case: dict) -> list[int]:
    """The fused kernel also gets two tokens of the base alone, one of them the first."""
    drawn = spread(case["spread"], case["tokens"], case["experts"])
    return drawn if case["kernel"] == "decode" or len(drawn) < 4 else [BASE, *drawn[1:-1], BASE]


def wanted(case: dict) -> Compilation:
    """What `compile_ahead` takes."""
    slots = token_slots(case)
    routing = Routing.build(slots)
    rows, width, count = case["rows"], case["width"], routing.likely
    two, one = (2, True) if case["bits"] == 0 else (case["bits"] // 2, case["bits"] % 2 == 1)
    variant = Variant(two, one, case["group"] or 0, 16 if case["salient"] else 0)
    about = rows, width, variant, case["dtype"]
    if case["kernel"] == "decode":
        return decode_job(*about, count, routing.piece)
    return fused_job(*about, choose_fused(rows, width, count, bucket(len(slots), least=8), variant.planes))


def error(case: dict) -> float:
    """Relative error against fp64, and whether a token depends on its batch mates (then infinite)."""
    torch.manual_seed(0)
    shape = case["rows"], case["width"]
    widths = [1, 2, 3, 4] if case["bits"] == 0 else [case["bits"]] * case["experts"]
    deltas = [random_delta(*shape, bits, case["group"], case["salient"]) for bits in widths]
    if case["bits"] == 0:
        deltas[1] = None
    slots = token_slots(case)
    layer = SlotLinear.build(deltas, DEVICE)
    x = (torch.randn(len(slots), shape[1], device=DEVICE) + case["mean"]).to(case["dtype"])
    weight = (torch.randn(shape, device=DEVICE) * 0.02).to(case["dtype"])
    before = torch.randn(len(slots), shape[0], device=DEVICE).to(case["dtype"])
    fused = case["kernel"] == "fused"
    expected = x.double() @ weight.double().T if fused else before.double()
    for slot in set(slots) - {BASE}:
        if deltas[slot] is not None:
            tokens = torch.tensor([t for t, own in enumerate(slots) if own == slot], device=DEVICE)
            expected[tokens] += x[tokens].double() @ deltas[slot].dequantize().double().T

    def run(routing: Routing) -> torch.Tensor:
        if fused:
            return fused_linear(x, weight, layer, routing)
        return expert_linear(before.clone(), x, layer, routing)

    routing = Routing.build(slots, DEVICE)
    y, again = run(routing), run(routing)
    own = min(1, len(slots) - 1)  # the token that stays when its batch mates leave
    alone = [slot if slot == slots[own] else BASE for slot in slots]
    single = run(Routing.build(alone, DEVICE, pieces=routing.slots.numel()))
    if not torch.equal(y, again) or not torch.equal(y[own], single[own]) or layer.arrived.any():
        return float("inf")
    return ((y.double() - expected).norm() / expected.norm()).item()


def check() -> list[dict]:
    return judged(cases(), lambda case: {"error": error(case)})


def judged(cases: list[dict], errors: Callable[[dict], dict[str, float]]) -> list[dict]:
    """Every case with its errors and whether all are within its type's tolerance; prints what fails, PASS or FAIL."""
    rows = []
    for case in cases:
        try:
            found, note = errors(case), ""
        except Exception as failure:  # noqa: BLE001 - report every case
            found, note = {"error": float("nan")}, f"{type(failure).__name__}: {str(failure)[:300]}"
        good = all(value <= TOLERANCE[case["dtype"]] for value in found.values())
        rows.append(case | {"dtype": str(case["dtype"]), "pass": good} | found)
        if not good:
            print(f"FAIL {found} {case} {note}", flush=True)
    worst = max(value for row in rows for name, value in row.items() if name in ("error", "prefill", "embedding"))
    passed = sum(row["pass"] for row in rows)
    print(f"{'PASS' if passed == len(rows) else 'FAIL'}: {passed} of {len(rows)} cases, worst error {worst:.2e}")
    return rows

"""Numbers before timings: the kernel against fp64 on the GPU."""

import torch

from meswitch.ops import Routing, SlotLinear, expert_linear
from meswitch.ops.triton_launch import choose, constants
from ops_models import DEVICE, random_delta, spread

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
SPREADS = ("identical", "distinct", "uniform", "zipf", "skewed")


def cases() -> list[dict]:
    """Every bit width at even and odd sizes, every spread, group sizes, salient counts, both types."""
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
    found += [base | {"group": group} for group in (16, 64, 512, None)]
    found += [base | {"salient": salient} for salient in (0, 1, 8)]
    found += [base | {"dtype": torch.float16, "bits": bits} for bits in (1, 2)]
    found += [base | {"bits": 0}]  # experts of 1-4 bits and an unchanged one
    found += [base | {"mean": 10.0}, base | {"tokens": 1, "experts": 1}, base | {"rows": 28672, "experts": 2}]
    return found


def wanted(case: dict) -> tuple[tuple, dict]:
    """What `ops_timing.compile_all` takes."""
    slots = spread(case["spread"], case["tokens"], case["experts"])
    routing = Routing.build(slots)
    config = choose(case["rows"], case["width"], routing.slots.numel(), routing.max_tokens)
    two, one = (True, True) if case["bits"] == 0 else (case["bits"] > 1, case["bits"] % 2 == 1)
    salient = 16 if case["salient"] else 0
    fixed = constants(config, case["rows"], case["width"], two, one, case["group"] or 0, salient)
    return (case["dtype"], case["rows"], case["width"], config.split), fixed


def error(case: dict) -> float:
    """Relative error against fp64, and whether a token depends on its batch mates (then infinite)."""
    torch.manual_seed(0)
    shape = case["rows"], case["width"]
    widths = [1, 2, 3, 4] if case["bits"] == 0 else [case["bits"]] * case["experts"]
    deltas = [random_delta(*shape, bits, case["group"], case["salient"]) for bits in widths]
    if case["bits"] == 0:
        deltas[1] = None
    token_slots = spread(case["spread"], case["tokens"], case["experts"])
    layer = SlotLinear.build(deltas, DEVICE)
    x = (torch.randn(len(token_slots), shape[1], device=DEVICE) + case["mean"]).to(case["dtype"])
    before = torch.randn(len(token_slots), shape[0], device=DEVICE).to(case["dtype"])
    expected = before.double()
    for slot in set(token_slots):
        if deltas[slot] is not None:
            tokens = torch.tensor([t for t, own in enumerate(token_slots) if own == slot], device=DEVICE)
            expected[tokens] += x[tokens].double() @ deltas[slot].dequantize().double().T
    routing = Routing.build(token_slots, DEVICE)
    y = expert_linear(before.clone(), x, layer, routing)
    again = expert_linear(before.clone(), x, layer, routing)
    alone = [own if own == token_slots[0] else -1 for own in token_slots]
    buckets = {"experts": routing.slots.numel(), "max_tokens": routing.max_tokens}
    single = expert_linear(before.clone(), x, layer, Routing.build(alone, DEVICE, **buckets))
    if not torch.equal(y, again) or not torch.equal(y[0], single[0]):
        return float("inf")
    return ((y.double() - expected).norm() / expected.norm()).item()


def check() -> list[dict]:
    """Print one line a case and PASS or FAIL."""
    rows = []
    for case in cases():
        try:
            value, note = error(case), ""
        except Exception as failure:  # noqa: BLE001 - report every case
            value, note = float("nan"), f"{type(failure).__name__}: {str(failure)[:150]}"
        good = value <= TOLERANCE[case["dtype"]]
        rows.append({k: str(v) if k == "dtype" else v for k, v in case.items()} | {"error": value, "pass": good})
        if not good or note:
            print(f"FAIL {value:.2e} {case} {note}")
    worst = max((row["error"] for row in rows), default=0.0)
    passed = sum(row["pass"] for row in rows)
    print(f"{'PASS' if passed == len(rows) else 'FAIL'}: {passed} of {len(rows)} cases, worst error {worst:.2e}")
    return rows

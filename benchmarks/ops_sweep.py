"""Which items suit which linear: the fused kernel with other choices than `choose_fused`."""

import dataclasses
from collections.abc import Callable

import torch

from meswitch.ops import Routing
from meswitch.ops.routing import bucket
from meswitch.ops.slots import Variant
from meswitch.ops.triton_launch import FusedConfig, choose_fused, fused, fused_constants
from ops_decode import DEPTH, Model, inputs, outputs
from ops_models import DEVICE, MODELS, Layer, spread
from ops_timing import Kernel, graph_ms

CASES = [(1, 1), (8, 4), (16, 1), (32, 1), (32, 4), (16, 16)]  # batch, experts


def _delta(config: FusedConfig, **changes: int) -> FusedConfig:
    return dataclasses.replace(config, delta=dataclasses.replace(config.delta, **changes))


CHANGES: dict[str, Callable[[FusedConfig], FusedConfig]] = {
    "as chosen": lambda c: c,
    "base split half": lambda c: dataclasses.replace(c, base_split=max(1, c.base_split // 2)),
    "base split double": lambda c: dataclasses.replace(c, base_split=c.base_split * 2),
    "delta split half": lambda c: _delta(c, split=max(1, c.delta.split // 2)),
    "delta split double": lambda c: _delta(c, split=c.delta.split * 2),
    "one stage less": lambda c: dataclasses.replace(c, base_stages=c.base_stages - 1),
    "one stage more": lambda c: dataclasses.replace(c, base_stages=c.base_stages + 1),
    "other base rows": lambda c: dataclasses.replace(c, base_rows=192 - c.base_rows),
    "other order": lambda c: dataclasses.replace(c, deltas_first=not c.deltas_first),
    "base split half, other order": lambda c: dataclasses.replace(
        c, base_split=max(1, c.base_split // 2), deltas_first=not c.deltas_first
    ),
    "other warps": lambda c: _delta(c, warps=6 - c.delta.warps),
}


def _configs(batch: int, experts: int, change: str) -> Callable[[int, int], FusedConfig]:
    tokens = bucket(-(-batch // experts), least=8)
    return lambda rows, width: CHANGES[change](choose_fused(rows, width, experts, tokens, bucket(batch, least=8)))


def wanted(name: str) -> list[Kernel]:
    """What `ops_timing.compile_all` takes."""
    found = []
    for batch, experts in CASES:
        for change in CHANGES:
            config = _configs(batch, experts, change)
            for rows, width in MODELS[name][1].values():
                fixed = fused_constants(config(rows, width), rows, width, Variant(True, False, 128, 16), False)
                found.append(Kernel("fused", torch.bfloat16, rows, width, fixed))
    return found


def sweep(model: Model) -> list[dict]:
    """Microseconds of a linear for each case and change; prints a line a linear."""
    found = []
    for batch, experts in CASES:
        routing = Routing.build(spread("distinct", batch, experts), DEVICE)
        x, y = inputs(model.layers, batch), outputs(model.layers, batch)
        for name, (rows, width) in MODELS[model.name][1].items():
            own, times = [layer for layer in model.layers if layer.name == name][:DEPTH], {}
            for change in CHANGES:
                config = _configs(batch, experts, change)(rows, width)
                try:
                    ms = graph_ms(lambda o=own, r=routing, c=config, x=x, y=y: _run(o, x, y, r, c), 5)
                except Exception as failure:  # noqa: BLE001 - too much shared memory, for one
                    print(f"  {change}: {type(failure).__name__} {str(failure)[:80]}")
                    continue
                times[change] = ms * 1e3 / len(own)
            text = ", ".join(f"{change} {us:.1f}" for change, us in sorted(times.items(), key=lambda t: t[1])[:4])
            print(f"B{batch} E{experts} {name}: chosen {times.get('as chosen', 0):.1f} us; best {text}", flush=True)
            where = {"batch": batch, "experts": experts, "linear": name}
            found += [where | {"change": change, "us": us} for change, us in times.items()]
    return found


def _run(layers: list[Layer], x: dict, y: dict, r: Routing, config: FusedConfig) -> None:
    for layer in layers:
        rows, width = layer.weight.shape
        fused(y[rows], x[width], layer.weight, None, layer.deltas, r, config)

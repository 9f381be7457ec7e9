"""Others' kernels behind one interface: what a linear's deltas add to a step's tokens. See `peers.py`.

Every class is one linear with all its experts. `dense()`: [experts, rows, width] float32, what it stores.
`product(step, kind)`: a function of x [tokens, width] and y [tokens, rows], which may write y and returns the result.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from benchmarks.kernels.decode import SLOTS
from benchmarks.kernels.shapes import DEVICE
from meswitch.ops import Routing

GROUP = 128
SLICES = {"qkv": (4096, 1024, 1024), "gate_up": (14336, 14336)}  # Mistral-7B's linears that vLLM has adapters for
BF16: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """Every expert has as many of the tokens, side by side."""

    tokens: int
    experts: int

    @cached_property
    def parts(self) -> list[slice]:
        count = self.tokens // self.experts
        return [slice(e * count, (e + 1) * count) for e in range(self.experts)]

    @cached_property
    def routing(self) -> Routing:
        return Routing.build([t * self.experts // self.tokens for t in range(self.tokens)], DEVICE)

    @cached_property
    def lora(self) -> tuple:
        """What vLLM's operators want to know of it."""
        from vllm.lora.ops.triton_ops import LoRAKernelMeta

        meta = LoRAKernelMeta.make(self.experts, self.tokens, DEVICE)
        meta.prepare_tensors(torch.arange(self.tokens, device=DEVICE) * self.experts // self.tokens)
        return meta.meta_args(self.tokens, False)


def random_codes(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Words of 16 codes [experts, rows, width / 16] int32, scales [experts, rows, width / GROUP]."""
    codes = torch.empty(SLOTS, rows, width // 16, dtype=torch.int32, device=DEVICE).random_()
    return codes, torch.empty(SLOTS, rows, width // GROUP, **BF16).uniform_(5e-4, 1.5e-3)


class Humming:
    def __init__(self, name: str, rows: int, width: int) -> None:
        from humming.schema import HummingWeightSchema
        from humming.transform import transform_humming_tensors

        self.schema = HummingWeightSchema(b_dtype="uint2", bs_dtype="bfloat16", weight_scale_group_size=GROUP)
        self.shape = rows, width
        self.stored = dict(zip(("weight", "weight_scale"), random_codes(rows, width), strict=True))
        self.tensors = transform_humming_tensors(self.config(SLOTS), self.stored)
        self.locks = torch.zeros(2048, dtype=torch.int32, device=DEVICE)

    def dense(self) -> Tensor:
        return self.schema.dequant_tensors(self.stored)

    def config(self, experts: int) -> Any:
        from humming.transform import prepare_layer_config

        return prepare_layer_config(*self.shape, self.schema, num_experts=experts, torch_dtype=torch.bfloat16)

    def chosen(self, step: Step, kind: str) -> tuple[Any, str, str]:
        """Configuration of the layer, kind of product, and the schedule that humming takes for the step."""
        from humming.tune import get_heuristics_config

        config = self.config(0 if kind == "dense" else step.experts)
        tuning = get_heuristics_config(config, step.tokens, gemm_type=kind)
        return config, json.dumps({"gemm_type": kind}), json.dumps(tuning)

    def product(self, step: Step, kind: str) -> Product:
        from humming.forward import humming_forward

        config, compute, tuning = self.chosen(step, kind)
        own = {key: value[0] if kind == "dense" else value[: step.experts] for key, value in self.tensors.items()}
        own |= {"locks": self.locks, "compute_config": compute, "tuning_config": tuning}
        if kind == "grouped_contiguous":
            own["expert_layout"] = torch.tensor([0, *(part.stop for part in step.parts)], device=DEVICE)
        if kind == "indexed":
            own |= _indexed(step, json.loads(tuning)["block_shape"][0])
        return lambda x, y: humming_forward(config, inputs=x, outputs=y, **own)

    @staticmethod
    def compile(linears: "list[Humming]", steps: list[Step], workers: int) -> None:
        """What these steps need, many at once: nvcc takes seconds for each."""
        from humming.kernel.humming import HummingKernel

        chosen = [
            linear.chosen(step, kind)
            for linear, step in itertools.product(linears, steps)
            for kind in ways("humming", step).values()
        ]
        jobs = {(config.to_str(), compute, tuning) for config, compute, tuning in chosen}
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda job: HummingKernel.prepare_kernels(*job), jobs))


def _indexed(step: Step, block: int) -> dict[str, Tensor]:
    """Tokens by expert, filled up to whole blocks with a token that is none."""
    blocks = math.ceil(step.parts[0].stop / block)
    fill = [step.tokens] * (blocks * block - step.parts[0].stop)
    numbers = {
        "sorted_ids": [t for part in step.parts for t in [*range(part.start, part.stop), *fill]],
        "expert_ids": [e for e in range(step.experts) for _ in range(blocks)],
        "num_tokens_padded": step.experts * blocks * block,
    }
    return {key: torch.tensor(value, dtype=torch.int32, device=DEVICE) for key, value in numbers.items()}


class Gemlite:
    """A module, and a launch, for each expert."""

    def __init__(self, name: str, rows: int, width: int) -> None:
        from gemlite import DType, GemLiteLinear
        from gemlite.core import GEMLITE_TRITON_KERNELS

        for kernel in itertools.chain.from_iterable(family.kernel for family in GEMLITE_TRITON_KERNELS):
            kernel.do_bench = _brief
        self.codes, self.scales = random_codes(rows, width)
        self.shape = rows, width
        types = {"input_dtype": DType.BF16, "output_dtype": DType.BF16}
        self.modules = [
            GemLiteLinear(2, GROUP, width, rows, **types).pack(self._unpacked(e), self.scales[e], zeros=2)
            for e in range(SLOTS)
        ]

    def _unpacked(self, expert: int) -> Tensor:
        shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=DEVICE)
        return (self.codes[expert, ..., None] >> shifts & 3).to(torch.uint8).view(self.shape)

    def dense(self) -> Tensor:
        levels = torch.stack([self._unpacked(e) for e in range(SLOTS)]).float() - 2
        return levels * self.scales.float().repeat_interleave(GROUP, -1)

    def product(self, step: Step, kind: str) -> Product:
        def run(x: Tensor, y: Tensor) -> Tensor:
            found = [module(x[part]) for module, part in zip(self.modules, step.parts, strict=False)]
            return found[0] if len(found) == 1 else torch.cat(found, out=y)

        return run


def _brief(call: Callable[[], object], quantiles: tuple[float, ...]) -> object:
    """Its autotuner with a tenth of the usual time for each choice."""
    return triton.testing.do_bench(call, warmup=2, rep=10, quantiles=quantiles)


class Lora:
    """Adapters. a: for each slice [experts, rank, width]. b: [experts, rows of the slice, rank]. They add to y."""

    def __init__(self, name: str, rows: int, width: int, rank: int) -> None:
        import vllm.lora.ops.triton_ops  # noqa: F401

        self.rank = rank
        self.slices = SLICES.get(name, (rows,))
        self.a = [torch.empty(SLOTS, rank, width, **BF16).normal_(std=0.01) for _ in self.slices]
        self.b = [torch.empty(SLOTS, count, rank, **BF16).normal_(std=0.01) for count in self.slices]

    def dense(self) -> Tensor:
        return torch.cat([b.float() @ a.float() for a, b in zip(self.a, self.b, strict=True)], 1)

    def product(self, step: Step, kind: str) -> Product:
        from vllm.lora.ops.triton_ops import lora_expand, lora_shrink

        meta, shape = step.lora, (len(self.slices), step.tokens, self.rank)

        def run(x: Tensor, y: Tensor) -> Tensor:
            hidden = torch.empty(shape, dtype=torch.float32, device=DEVICE)
            lora_shrink(x, self.a, hidden, *meta, 1.0)
            lora_expand(hidden, self.b, y, *meta, offset_start=0, add_inputs=True)
            return y

        return run


PEERS: dict[str, Callable[[str, int, int], Any]] = {
    "humming": Humming,
    "gemlite": Gemlite,
    "vllm lora16": lambda *shape: Lora(*shape, 16),
    "vllm lora64": lambda *shape: Lora(*shape, 64),
}


def ways(peer: str, step: Step) -> dict[str, str]:
    """Names of the ways to run it, and the kind of product that each is."""
    if peer == "humming" and step.experts > 1:
        return {"humming indexed": "indexed", "humming grouped": "grouped_contiguous"}
    return {peer: "dense"}


@contextmanager
def compiled_only(workers: int) -> Iterator[None]:
    """Triton's kernels that are called inside are compiled, each for all its autotuner's choices, and not run."""
    run, tune = JITFunction.run, Autotuner.run

    def compile_(self, *args, grid, warmup, **more):
        return run(self, *args, grid=grid, warmup=True, **more)

    def compile_all(self, *args, warmup, **more):
        return self.warmup(*args, **more)

    JITFunction.run, Autotuner.run = compile_, compile_all
    try:
        with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        JITFunction.run, Autotuner.run = run, tune

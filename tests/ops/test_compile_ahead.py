"""Kernels compiled ahead are those that a step launches: on a GPU by Triton's own cache, else by their constants."""

import importlib

import pytest
import torch

from meswitch.ops import (
    PrefillRouting,
    Routing,
    SlotLinear,
    embedding_rows,
    expert_linear,
    expert_prefill,
    fused_linear,
    fused_linears,
)
from meswitch.ops.codes import Codes
from meswitch.ops.triton.ahead import (
    Compilation,
    compile_ahead,
    decode_jobs,
    dequantise_job,
    embedding_job,
    fused_jobs,
    prefill_jobs,
)
from tests.support.deltas import DEVICE, in_one_arena, random_delta

ROWS, WIDTH, DTYPE = 256, 1024, torch.bfloat16
ROWS_OF_LINEARS = 15  # place among the fused kernel's arguments
CODES = [torch.ones(ROWS, WIDTH, dtype=torch.int8), torch.ones(ROWS, WIDTH // 2, dtype=torch.uint8)]
SCALES = [torch.ones(ROWS), torch.ones(WIDTH // 128, ROWS)]
STEPS = [[0], [0, 1, 2, -1], [0] * 9 + [1] * 3, [t % 3 for t in range(40)]]
JOINED = STEPS[:2]  # steps of several linears: the interpreter takes its time for each


@pytest.fixture
def layer():
    return SlotLinear.build([random_delta(ROWS, WIDTH, 2, 128, salient=2, seed=seed) for seed in range(3)], DEVICE)


def jobs(layer):
    about = ROWS, WIDTH, layer.variant, DTYPE
    built = [(slots, Routing.build(slots)) for slots in STEPS]
    steps = [(len(slots), routing.slots.numel(), routing.likely) for slots, routing in built]
    held = [job for codes in CODES for job in fused_jobs(*about, False, steps, codes.dtype)]
    held += [dequantise_job(ROWS, WIDTH, DTYPE, codes.dtype) for codes in CODES]
    held += fused_jobs((ROWS, ROWS), *about[1:], False, steps)
    found = [*fused_jobs(*about, False, steps), *held, *decode_jobs(*about, 8), *prefill_jobs(*about, False, 1024)]
    return [*found, embedding_job(*about, False)]


def run(layer):
    weight = torch.randn(ROWS, WIDTH).to(DEVICE, DTYPE)
    held = [Codes(codes.to(DEVICE), scale.to(DEVICE)) for codes, scale in zip(CODES, SCALES, strict=True)]
    for codes in held:
        codes.into(torch.empty_like(weight), "triton")
    for slots in STEPS:
        x, routing = torch.randn(len(slots), WIDTH).to(DEVICE, DTYPE), Routing.build(slots, DEVICE)
        for codes in held:
            fused_linear(x, codes, layer, routing, backend="triton")
        if slots in JOINED:
            fused_linears(x, [weight, weight], in_one_arena([layer, layer]), routing, [None, None], "triton")
        expert_linear(fused_linear(x, weight, layer, routing, backend="triton"), x, layer, routing, "triton")
    owners = [0] * 256 + [1] * 300 + [2] * 100 + [-1] * 20
    x = torch.randn(len(owners), WIDTH).to(DEVICE, DTYPE)
    expert_prefill(x, weight, layer, PrefillRouting.build(owners, DEVICE), backend="triton")
    slots = torch.tensor([0, 1, -1], dtype=torch.int32, device=DEVICE)
    embedding_rows(torch.tensor([5, 6, 7], device=DEVICE), weight, layer, slots, backend="triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")
def test_a_step_compiles_nothing_more(layer, monkeypatch):
    from meswitch.ops.triton.codes import dequantise_kernel
    from meswitch.ops.triton.decode import decode_kernel
    from meswitch.ops.triton.fused import fused_kernel
    from meswitch.ops.triton.merge import merge_kernel, rows_kernel

    kernels = decode_kernel, dequantise_kernel, fused_kernel, merge_kernel, rows_kernel
    assert compile_ahead(jobs(layer)) > 5

    def compiled():
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    before = compiled()
    assert all(before)
    run(layer)
    assert compiled() == before


@pytest.mark.slow
def test_jobs_have_the_constants_of_the_launches(layer, monkeypatch):
    launched = []

    class Recorder:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                rows = arguments[ROWS_OF_LINEARS] if self.name == "fused" else ROWS
                scratch = self.name == "decode" and constants["SPLIT"] > 1
                launched.append(Compilation(self.name, DTYPE, rows, WIDTH, constants, scratch))
                return self.kernel[grid](*arguments, **constants)

            return launch

    for name, home in (("fused", "fused"), ("decode", "decode"), ("dequantise", "codes")):
        module = importlib.import_module(f"meswitch.ops.triton.{home}")
        kernel = getattr(module, f"{name}_kernel")
        monkeypatch.setattr(module, f"{name}_kernel", Recorder(name, kernel))
    run(layer)
    known = {job.key for job in jobs(layer)}
    assert {job.kernel for job in launched} == {"fused", "decode", "dequantise"}
    assert {job.key for job in launched} <= known


def test_jobs_that_are_one_compilation_have_one_key(layer):
    about = 512, WIDTH, layer.variant, DTYPE
    [one], [other], [biased] = (
        list(fused_jobs(n, *about[1:], bias, [(8, 2, 2)])) for n, bias in ((512, False), (640, False), (512, True))
    )
    assert one.key == other.key
    assert one.key != biased.key

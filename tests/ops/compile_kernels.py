"""Compile the kernels for GPUs that this machine need not have; prints what does not compile. See `test_compiling`."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import MockTensor, mangle_type

from meswitch.ops.layout import Variant
from meswitch.ops.triton.ahead import (
    Compilation,
    decode_jobs,
    dequantise_job,
    embedding_job,
    fused_jobs,
    launched,
    prefill_jobs,
    product_job,
)

TYPES = {
    torch.int8: "*i8",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "maxnreg", "launch_pdl")


def jobs() -> list[Compilation]:
    """Every kernel in its main variants."""
    two, odd = Variant(True, False, 128, 16), Variant(True, True, 0, 0)
    bf16, fp16 = torch.bfloat16, torch.float16
    found = [
        *fused_jobs(6144, 4096, two, bf16, True, [(32, 16, 16), (32, 7, 4)]),
        *fused_jobs((4096, 1024, 1024), 4096, two, bf16, True, [(32, 16, 16)]),
        *fused_jobs((200, 64), 1100, odd, fp16, False, [(8, 2, 2)], torch.int8),
        *fused_jobs(6144, 4096, two, bf16, True, [(32, 16, 16)], torch.int8),
        *fused_jobs(200, 1100, odd, fp16, False, [(8, 2, 2)], torch.float8_e4m3fn),
        *fused_jobs(4096, 14336, Variant(0, False, 0, 0), bf16, False, [(8, 0, 1)], torch.float8_e4m3fn),
        *fused_jobs(4096, 4096, two, bf16, True, [(32, 16, 16)], torch.uint8),
        *fused_jobs(200, 1152, odd, fp16, False, [(64, 2, 2)], torch.uint8),
        dequantise_job(4096, 14336, bf16, torch.int8),
        dequantise_job(4096, 11008, bf16, torch.uint8),
        dequantise_job(201, 1100, fp16, torch.float8_e4m3fn),
        *decode_jobs(4096, 4096, two, bf16, 1),
        embedding_job(32000, 4096, two, bf16, True),
        product_job(4096, 4096, two, bf16, True),
    ]
    layers = (4096, 4096, two, bf16, False), (200, 1100, odd, fp16, False)
    merges = itertools.chain.from_iterable(prefill_jobs(*layer, 64) for layer in layers)
    found += [job for job in merges if job.constants.get("EXPERTS") in (None, 2)]
    return list({job.key: job for job in found}.values())


def compile_for(job: Compilation, capability: int) -> str:
    kernel, arguments = launched(job)
    constants = {name: value for name, value in job.constants.items() if name not in OPTIONS}
    options = {name: value for name, value in job.constants.items() if name in OPTIONS}
    if "EARLY" in constants and capability >= 90:
        constants["EARLY"], options["launch_pdl"] = True, True
    names = kernel.arg_names
    signature: dict[str, Any] = dict.fromkeys(names, "constexpr")
    aligned = {}
    for place, argument in enumerate(arguments):
        own = argument if isinstance(argument, tuple) else (argument,)
        types = []
        for number, one in enumerate(own):
            if isinstance(one, int | torch.dtype | MockTensor):
                dtype = one.dtype if isinstance(one, MockTensor) else one
                types.append("i32" if isinstance(one, int) else TYPES[dtype])
                if not isinstance(one, int) or one % 16 == 0:
                    at = (place, number) if isinstance(argument, tuple) else (place,)
                    aligned[at] = [["tt.divisibility", 16]]
            else:
                types.append(mangle_type(one))  # a descriptor
        signature[names[place]] = tuple(types) if isinstance(argument, tuple) else types[0]
    try:
        source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, aligned)
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # noqa: BLE001 - the test prints it
        return f"{job} on sm_{capability}: {type(error).__name__}: {str(error)[-600:]}"
    return ""


if __name__ == "__main__":
    work = [(job, capability) for job in jobs() for capability in ((90,) if job.kernel == "product" else (80, 90))]
    with ThreadPoolExecutor(2) as pool:
        failed = [text for text in pool.map(lambda pair: compile_for(*pair), work) if text]
    print("\n".join(failed) or f"{len(work)} compiled")
    sys.exit(bool(failed))

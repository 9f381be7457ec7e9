"""The kernel of error feedback rounds as the loop in PyTorch does; without a GPU, Triton's interpreter runs it."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

COMPARE = """
import torch
from meswitch.codec import feedback, feedback_triton, mse_scales

device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator().manual_seed(0)
for bits in (1, 2, 3, 4):
    for columns, outputs in ((1, 1), (7, 5), (32, 64), (31, 150)):
        target, original = torch.randn(2, columns, outputs, generator=generator)
        scale = mse_scales(target, bits, 16)
        step = scale.float().repeat_interleave(16, 1)[:, :outputs].contiguous()
        step[:, ::5] = 0
        inputs = torch.randn(4 * columns, columns + 9, generator=generator)
        moment = inputs.T @ inputs / len(inputs)
        wide = feedback.upper_factor(feedback.damped(moment, 0.01), torch.arange(columns + 9))
        found = []
        for round_columns in (feedback.round_columns_on_host, feedback_triton.round_columns):
            place = "cpu" if round_columns is feedback.round_columns_on_host else device
            codes = torch.full((columns, outputs), 77, dtype=torch.uint8, device=place)
            moved = [part.clone().to(place) for part in (target, original, step, wide / wide.diagonal())]
            share = moved[3][3:, 3:][:columns, :columns]
            errors = round_columns(*moved[:3], share, 2**bits - 1, codes)
            found.append((codes.cpu(), errors.cpu()))
        assert torch.equal(found[0][0], found[1][0]), (bits, columns, outputs)
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-5), (bits, columns, outputs)
print("same")
"""


@pytest.mark.slow
def test_the_kernel_rounds_as_the_loop_does():
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"  # read when triton is imported
    result = subprocess.run(
        [sys.executable, "-c", COMPARE], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.stdout == "same\n", result.stderr

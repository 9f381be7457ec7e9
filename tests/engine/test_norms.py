"""Norms of a mixed batch: one call where the norm takes a weight for each row, else one for each expert."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from meswitch.engine.context import StepContext
from meswitch.engine.layers import SwitchableNorm, _scales_row_by_row

WIDTH = 16
SLOTS = [2, -1, 0, 2]  # of four requests; slot 1 has no row, slot 0's expert leaves this norm unchanged
LENGTHS = [3, 1, 2, 1]


def switch(tensors):
    step = StepContext.build(LENGTHS, ["a", "b", "c", "d"], SLOTS, None, padding=2)
    return SimpleNamespace(step=step, tensors=lambda slot: tensors.get(slot, {}))


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize(
    ("norm", "row_by_row"),
    [
        (LlamaRMSNorm(WIDTH), True),
        (GemmaRMSNorm(WIDTH), True),
        (nn.LayerNorm(WIDTH, bias=False), False),
        (nn.LayerNorm(WIDTH), False),
        (nn.RMSNorm(WIDTH), False),
    ],
)
def test_every_row_has_its_own_expert_s_weights(norm, row_by_row, heads):
    torch.manual_seed(0)
    assert _scales_row_by_row(norm) is row_by_row
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    own = {key: torch.randn_like(parameter) for key, parameter in norm.named_parameters()}
    layer = SwitchableNorm(norm, "n", switch({2: {f"n.{key}": value for key, value in own.items()}}))
    shape = (1, sum(LENGTHS) + 2, *([] if heads is None else [heads]), WIDTH)
    x = torch.randn(shape)
    with torch.no_grad():
        found, base, expert = layer(x), norm(x), torch.func.functional_call(norm, own, (x,))
    theirs = torch.tensor([True] * 3 + [False] * 3 + [True] + [False] * 2)
    assert torch.equal(found[:, theirs], expert[:, theirs])
    assert torch.equal(found[:, ~theirs], base[:, ~theirs])
    assert not torch.equal(base, expert)


def test_a_step_of_the_base_alone_is_the_base():
    norm = LlamaRMSNorm(WIDTH)
    alone = SimpleNamespace(step=StepContext.build([2], ["a"], [-1], None), tensors=lambda slot: {})
    x = torch.randn(1, 2, WIDTH)
    assert torch.equal(SwitchableNorm(norm, "n", alone)(x), norm(x))

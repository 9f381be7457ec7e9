"""Norms of a mixed batch: one call where the norm takes a weight for each row, else one for each expert."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from meswitch.engine.context import StepContext
from meswitch.engine.layers import Seen, SwitchableNorm, scales_row_by_row
from meswitch.errors import MeswitchError

WIDTH = 16
SLOTS = [2, -1, 0, 2, -1]  # of five requests; slot 1 has no row, slot 0's expert leaves this norm unchanged
LENGTHS = [3, 1, 2, 1, 2]


def switch(tensors):
    step = StepContext.build(LENGTHS, SLOTS, None)
    return SimpleNamespace(step=step, tensors=lambda slot: tensors.get(slot, {}), alone=None, merged=None)


@pytest.mark.parametrize("place", ["after", "before", "none"])
@pytest.mark.parametrize(
    ("norm", "row_by_row"),
    [
        (LlamaRMSNorm(WIDTH), True),
        (GemmaRMSNorm(WIDTH), True),
        (nn.LayerNorm(WIDTH, bias=False), False),
        (nn.RMSNorm(WIDTH), False),
    ],
)
def test_every_row_has_its_own_expert_s_weights(norm, row_by_row, place):
    """place: of the heads, which a model may have swapped with the tokens."""
    torch.manual_seed(0)
    rows = sum(LENGTHS)
    shape, axis = {
        "after": ((1, rows, 3, WIDTH), 1),
        "before": ((1, rows, rows, WIDTH), 2),  # as many heads as tokens
        "none": ((1, rows, WIDTH), 1),
    }[place]
    seen = Seen("tokens", (axis,), (axis,), (shape, torch.float32))
    assert scales_row_by_row(norm, "weight", seen) is row_by_row
    if not row_by_row:
        return
    with torch.no_grad():
        norm.weight.normal_()
    own = torch.randn(WIDTH)
    layer = SwitchableNorm(norm, "n", switch({2: {"n.weight": own}}), seen, parameter="weight", stored="n.weight")
    x = torch.randn(shape)
    with torch.no_grad():
        found, base, expert = layer(x), norm(x), torch.func.functional_call(norm, {"weight": own}, (x,))
    theirs = torch.tensor([True] * 3 + [False] * 3 + [True] + [False] * 2)
    for rows_of, wanted in ((theirs, expert), (~theirs, base)):
        place_of = rows_of.nonzero().view(-1)
        assert torch.equal(found.index_select(axis, place_of), wanted.index_select(axis, place_of))
    assert not torch.equal(base, expert)


def test_a_step_of_the_base_alone_is_the_base():
    norm = LlamaRMSNorm(WIDTH)
    step = StepContext.build([2], [-1], None)
    alone = SimpleNamespace(step=step, tensors=lambda slot: {}, alone=None, merged=None)
    x = torch.randn(1, 2, WIDTH)
    seen = Seen("tokens", (1,), (1,), (tuple(x.shape), x.dtype))
    assert torch.equal(SwitchableNorm(norm, "n", alone, seen, parameter="weight", stored="n.weight")(x), norm(x))


def test_another_number_of_rows_than_the_step_has_is_refused_before_anything_is_computed():
    norm = LlamaRMSNorm(WIDTH)
    seen = Seen("tokens", (1,), (1,), ((1, 9, WIDTH), torch.float32))
    layer = SwitchableNorm(norm, "model.norm", switch({}), seen, parameter="weight", stored="n.weight")
    with pytest.raises(MeswitchError, match=r"model\.norm: 4 rows in a step of 9"):
        layer(torch.randn(1, 4, WIDTH))

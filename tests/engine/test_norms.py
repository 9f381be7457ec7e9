"""Norms of a mixed batch: one call where the norm takes a weight for each row, else one for each expert."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from meswitch.engine.context import StepContext, TableOwners
from meswitch.engine.layers import Seen, SwitchableLayerNorm, SwitchableNorm, rms_epsilon, scales_row_by_row
from meswitch.errors import MeswitchError
from meswitch.ops.routing import Step

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


@pytest.mark.parametrize("changed", [("weight", "bias"), ("bias",), ("weight",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_norm_from_tables_is_each_expert_s_own(dtype, changed):
    torch.manual_seed(0)
    norm = nn.LayerNorm(WIDTH, eps=1e-3).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    rows = sum(LENGTHS)
    seen = Seen("tokens", (1,), (1,), ((1, rows, WIDTH), dtype))
    stored = {name: f"n.{name}" for name in changed}
    values = {name: torch.randn(4, WIDTH).to(dtype) for name in changed}  # three slots, and the base
    for name in changed:
        values[name][3] = getattr(norm, name).detach()
    owner = [slot for slot, length in zip(SLOTS, LENGTHS, strict=True) for _ in range(length)]
    side = Step(16, 3, torch.device("cpu")).tokens
    side.fill(owner)
    tables = {f"n.{name}": SimpleNamespace(values=values[name]) for name in changed}
    owners = TableOwners(side, rows)
    by_slot = SimpleNamespace(step=StepContext(owners, owners), table=tables.get)
    layer = SwitchableLayerNorm(norm, "n", by_slot, seen, parameters=None, stored=stored)
    assert layer.names == {own.name for own in layer.looked_up} == set(stored.values())
    x = torch.randn(1, rows, WIDTH).to(dtype)
    with torch.no_grad():
        found = layer(x)
        for row, slot in enumerate(owner):
            own = {name: values[name][slot] for name in changed}
            wanted = torch.func.functional_call(norm, own, (x[:, row : row + 1],))
            rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found[:, row : row + 1], wanted, rtol=rtol, atol=1e-5)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("norm", "epsilon"),
    [
        (LlamaRMSNorm(WIDTH, eps=1e-5), 1e-5),
        (LlamaRMSNorm(WIDTH, eps=1e-6), 1e-6),
        (GemmaRMSNorm(WIDTH), None),  # multiplies by 1 + weight
        (nn.LayerNorm(WIDTH, bias=False), None),
    ],
)
def test_a_norm_that_torch_computes_in_one_kernel_is_known_by_what_it_gives(norm, epsilon, dtype):
    assert rms_epsilon(norm.to(dtype), "weight", dtype) == epsilon


def test_a_norm_that_rounds_after_its_weight_is_another_one():
    assert rms_epsilon(Olmo2RMSNorm(512), "weight", torch.float32) == 1e-6
    assert rms_epsilon(Olmo2RMSNorm(512).bfloat16(), "weight", torch.bfloat16) is None


@pytest.mark.parametrize("shape", [(1, sum(LENGTHS), 512), (1, sum(LENGTHS), 3, 512)])
def test_rows_from_a_table_are_what_each_expert_s_norm_gives(shape):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(512).bfloat16()
    owners = torch.randint(3, (shape[1],))
    own = torch.randn(3, 512).bfloat16()
    table = SimpleNamespace(values=own)
    context = SimpleNamespace(alone=None, merged=None, table=lambda name: table)
    seen = Seen("tokens", (1,), (1,), (shape, torch.bfloat16))
    layer = SwitchableNorm(norm, "n", context, seen, parameter="weight", stored="n.weight")
    layer.owners = lambda rows: SimpleNamespace(in_tables=True, slots=owners)
    x = torch.randn(shape).bfloat16()
    with torch.no_grad():
        found = layer(x)
        wanted = torch.stack(
            [
                torch.func.functional_call(norm, {"weight": own[slot]}, (row,))
                for slot, row in zip(owners, x[0], strict=True)
            ]
        )[None]
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0)
    assert (found == wanted).float().mean() > 0.99

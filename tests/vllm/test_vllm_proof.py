"""Norms with each token's own weights, and the proof that finds what is wrong. No vLLM needed."""

import dataclasses

import pytest
import torch
from torch import nn

from meswitch.ops.routing import Step
from meswitch.vllm import support
from meswitch.vllm.arena import Arena
from meswitch.vllm.delta_op import DeltaNorm
from meswitch.vllm.dry_step import Call
from meswitch.vllm.places import NORM, Place, Source
from meswitch.vllm.proof import prove_layers
from meswitch.vllm.support import Formula, norm_vector

WIDTH, TOKENS = 32, 7
LAYER_NORM = "torch.nn.modules.normalization.LayerNorm"


class Model(nn.Module):
    def __init__(self, axis=0):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        place = Place("norm", self.norm, NORM, (Source("norm", 0, WIDTH, WIDTH),), WIDTH, 1, axis=axis)
        device = torch.device("cpu")
        self.arena = Arena(
            [place], [], str, slots=2, device=device, dtype=torch.float32, base_vocabulary=8, extra_rows=0
        )
        self.step = Step(16, 2, device)
        self.norm = DeltaNorm(self.norm, self.arena.layers[0].vectors, self.step, axis)

    def prove(self, *shape):
        return prove_layers(self, self.arena, self.step, {"norm": [Call("normalise", (torch.randn(shape),))]})


@pytest.mark.parametrize(("axis", "shape"), [(0, (TOKENS, WIDTH)), (1, (1, TOKENS, WIDTH)), (1, (4, TOKENS, WIDTH))])
@torch.inference_mode()
def test_each_token_has_its_own_experts_weights(axis, shape):
    model, x = Model(axis), torch.randn(shape)
    base, vectors = model.norm.base_layer, model.arena.layers[0].vectors
    experts = [norm_vector(base) + torch.randn(2 * WIDTH) for _ in range(2)]
    for slot, vector in enumerate(experts):
        vectors[slot] = vector
    owners = [0, -1, 1, 1, -1, 0, 0]
    model.step.tokens.fill(owners)
    found = model.norm(x)
    for token, owner in enumerate(owners):
        weight, bias = (norm_vector(base) if owner < 0 else experts[owner]).chunk(2)
        wanted = nn.functional.layer_norm(x.select(axis, token), (WIDTH,), weight, bias, base.eps)
        torch.testing.assert_close(found.select(axis, token), wanted)


def test_a_norm_that_computes_as_its_class_is_proven_and_leaves_nothing_behind():
    model = Model()
    before = norm_vector(model.norm.base_layer)
    assert model.prove(TOKENS, WIDTH) == []
    assert torch.equal(norm_vector(model.norm.base_layer), before)
    assert torch.equal(model.arena.vectors, before.expand(3, -1))
    assert not model.step.tokens.active


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        ({"offset": 1.0}, "base's own rows"),
        ({"centred": False}, "base's own rows"),
        ({"pair": True}, "returns something else"),
    ],
    ids=["offset", "not-centred", "returns-a-pair"],
)
def test_a_formula_that_is_not_the_classs_is_found(monkeypatch, formula, reason):
    right = support.FORMULAS[LAYER_NORM]
    monkeypatch.setitem(support.FORMULAS, LAYER_NORM, dataclasses.replace(right, **formula))
    (unserved,) = Model().prove(TOKENS, WIDTH)
    assert (unserved.name, unserved.kind) == ("norm", "LayerNorm")
    assert reason in unserved.reason


def test_rows_of_the_wrong_token_are_found():
    model = Model(axis=1)
    model.norm.axis = 0  # as many heads as tokens: no shape tells
    (unserved,) = model.prove(TOKENS, TOKENS, WIDTH)
    assert "base's own rows" in unserved.reason


def test_a_class_is_known_by_its_exact_name():
    class Own(nn.LayerNorm):
        pass

    assert support.formula_of(nn.LayerNorm(4)) == Formula(centred=True)
    assert support.formula_of(Own(4)) is None
    assert support.formula_of(nn.LayerNorm(4, elementwise_affine=False)) is None

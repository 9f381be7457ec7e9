"""Two dry steps show how a model calls its layers: where its tokens lie, and what reads weights without asking. No vLLM
needed: the models here are a few lines, their norms PyTorch's."""

import pytest
import torch
from torch import nn

from meswitch.vllm.dry_step import TOKENS, look
from meswitch.vllm.places import NORM, Place, Source

WIDTH, HEADS = 16, 4


class Steps:
    """Steps of a model that is given hidden states."""

    rows = TOKENS

    def __init__(self, model):
        self.model = model
        self.hidden = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))

    def run(self, changed=False):
        hidden = self.hidden.clone()
        if changed:
            hidden[[1, 4]] += 1
        self.model(hidden)


def look_at(forward, width=WIDTH):
    """What two steps of `forward(norm, hidden)` show of the norm."""
    model = nn.Module()
    model.norm = nn.LayerNorm(width)
    model.forward = lambda hidden: forward(model.norm, hidden)
    place = Place("norm", model.norm, NORM, (Source("norm", 0, width, width),), width, 1)
    return look(Steps(model), [place])


@pytest.mark.parametrize(
    ("axis", "width", "forward"),
    [
        (0, WIDTH, lambda norm, x: norm(x)),
        (1, WIDTH, lambda norm, x: norm(x[None])),
        (0, WIDTH // HEADS, lambda norm, x: norm(x.view(TOKENS, HEADS, -1))),
        (1, WIDTH // HEADS, lambda norm, x: norm(x.view(TOKENS, HEADS, -1).transpose(0, 1))),
        (2, WIDTH // HEADS, lambda norm, x: norm(x.view(1, TOKENS, HEADS, -1).transpose(1, 2))),
        (1, WIDTH, lambda norm, x: norm(x.expand(TOKENS, -1, -1))),
        (0, WIDTH, lambda norm, x: norm.forward(x)),
    ],
    ids=["tokens", "batch-tokens", "tokens-heads", "heads-tokens", "batch-heads-tokens", "as-many-heads", "forward"],
)
def test_the_axis_of_tokens_is_measured(axis, width, forward):
    seen = look_at(forward, width)
    assert not seen.unserved
    assert [place.axis for place in seen.places] == [axis]


@pytest.mark.parametrize(
    ("width", "forward", "reason"),
    [
        (WIDTH // HEADS, lambda norm, x: norm(x.reshape(-1, WIDTH // HEADS)), r"\[28, 4\]: which token"),
        (WIDTH, lambda norm, x: norm(x.flip(0)), r"\[7, 16\]: which token"),
        (WIDTH, lambda norm, x: norm(torch.ones_like(x)), r"\[7, 16\]: which token"),
        (WIDTH, lambda norm, x: x, "does not call it"),
        (WIDTH, lambda norm, x: norm(x) + x * norm.weight, r"aten\.mul.* reads its weights without asking it"),
        (WIDTH, lambda norm, x: norm(x[:1]) + norm(x.repeat(2, 1))[:1], r"\[1, 16\]: which token"),
        (WIDTH, lambda norm, x: norm(x)[None] + norm(x[None]), "another axis in one call than in the next"),
    ],
    ids=["tokens-times-heads", "turned-round", "constant", "not-called", "weight-read", "other-rows", "two-axes"],
)
def test_a_layer_whose_rows_are_not_known_is_refused_with_the_reason(width, forward, reason):
    seen = look_at(forward, width)
    assert not seen.places
    (unserved,) = seen.unserved
    assert (unserved.name, unserved.kind) == ("norm", "LayerNorm")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(unserved.reason)


def test_the_model_is_left_as_it_was():
    seen = look_at(lambda norm, x: norm(x))
    (place,) = seen.places
    assert "forward" not in vars(place.module)

"""Several linears of one input in one launch, against fp64: each as if it were computed alone."""

import dataclasses

import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.ops import Routing, SlotLinear, fused_linears
from meswitch.ops.codes import Codes
from tests.support.deltas import BACKENDS, DEVICE, TOLERANCE, error, expected, in_one_arena, random_delta

TOKENS = [0, 2, -1, 1, 2, 0, -1]


def made(rows, width, bits, group=64):
    """Layers of three slots each; of the second, the second slot's expert changes nothing."""
    deltas = [
        [
            random_delta(count, width, bits[slot], group, salient=place + slot, seed=9 * place + slot)
            for slot in (0, 1, 2)
        ]
        for place, count in enumerate(rows)
    ]
    deltas[1][1] = None
    return deltas, in_one_arena([SlotLinear.build(own, DEVICE) for own in deltas])


def inputs(rows, width, tokens, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(len(tokens), width, generator=draw).to(DEVICE, dtype)
    weights = [(torch.randn(count, width, generator=draw) * 0.05).to(DEVICE, dtype) for count in rows]
    return x, weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "width", "bits", "bias"),
    [
        ((256, 128, 128), 512, (2, 2, 2), True),
        ((130, 40), 1100, (1, 3, 4), False),
        ((20, 300, 37, 128), 100, (2, 1, 2), True),
    ],
)
def test_each_is_as_if_alone(backend, rows, width, bits, bias):
    deltas, layers = made(rows, width, bits)
    x, weights = inputs(rows, width, TOKENS)
    biases = [torch.linspace(-1, 1, count).to(x) if bias else None for count in rows]
    ys = fused_linears(x, weights, layers, Routing.build(TOKENS, DEVICE), biases, backend)
    for y, weight, offset, own, layer in zip(ys, weights, biases, deltas, layers, strict=True):
        base = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        assert error(y, expected(base, x, own, TOKENS)) < TOLERANCE[torch.bfloat16]
        assert y.is_contiguous()
        assert not layer.arrived.any()


def test_codes_of_the_base():
    rows, width = (128, 40), 256
    deltas, layers = made(rows, width, (2, 2, 2))
    x, _ = inputs(rows, width, TOKENS)
    draw = torch.Generator().manual_seed(1)
    held = [
        Codes(
            torch.randint(-127, 128, (count, width), generator=draw, dtype=torch.int8).to(DEVICE),
            (torch.rand(count, generator=draw) * 0.001).to(DEVICE),
        )
        for count in rows
    ]
    ys = fused_linears(x, held, layers, Routing.build(TOKENS, DEVICE), [None, None], "triton")
    for y, codes, own in zip(ys, held, deltas, strict=True):
        base = x.double() @ (codes.codes.double() * codes.scale.double()[:, None]).T
        assert error(y, expected(base, x, own, TOKENS)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("tokens", [1, 64])
def test_every_number_of_tokens(tokens):
    owners = [number % 4 - 1 for number in range(tokens)]
    deltas, layers = made((128, 64), 512, (2, 2, 2))
    x, weights = inputs((128, 64), 512, owners)
    ys = fused_linears(x, weights, layers, Routing.build(owners, DEVICE), [None, None], "triton")
    for y, weight, own in zip(ys, weights, deltas, strict=True):
        assert error(y, expected(x.double() @ weight.double().T, x, own, owners)) < TOLERANCE[torch.bfloat16]


def test_what_one_launch_cannot_compute_is_refused():
    rows, width = (64, 64), 512
    _, layers = made(rows, width, (2, 2, 2))
    x, weights = inputs(rows, width, TOKENS)
    routing, none = Routing.build(TOKENS, DEVICE), [None, None]
    elsewhere = [layers[0], dataclasses.replace(layers[1], arena=layers[1].arena.clone())]
    _, grouped = made(rows, width, (2, 2, 2), group=128)
    other_group = [layers[0], dataclasses.replace(grouped[1], arena=layers[0].arena)]
    codes = Codes(torch.ones(64, width, dtype=torch.int8, device=DEVICE), torch.ones(64, device=DEVICE))
    for given in (
        (weights, elsewhere, routing, none),
        (weights, other_group, routing, none),
        ([weights[0], codes], layers, routing, none),
        (weights, layers, routing, [torch.zeros(64).to(x), None]),
        (weights[:1] * 2, layers[:1] * 2, routing, none),  # as of tied weights: both would count in one place
    ):
        with pytest.raises(ConfigError, match="compute each with fused_linear"):
            fused_linears(x, *given, "triton")
    with pytest.raises(ConfigError, match="shapes"):
        fused_linears(x, [weights[0], weights[1][:, :100]], layers, routing, none, "triton")

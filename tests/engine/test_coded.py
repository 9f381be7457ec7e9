"""A base of which the engine holds the codes in 8 bits, on the GPU kernels: interpreted where there is no GPU."""

import logging

import pytest
import torch
from torch import nn

import meswitch
from meswitch import Engine
from meswitch.architecture import architecture_of
from meswitch.checkpoint import Checkpoint
from meswitch.compression.merge import load_merged
from meswitch.engine.coded import CodedLinear, Workspace, coded_layers
from meswitch.loaded import load_model
from meswitch.ops.codes import Codes
from meswitch.quantised import quantise
from tests.engine.test_kernels import FEW_ROWS, check, keep_tokens
from tests.support.deltas import DEVICE

pytest.importorskip("triton")

OPTIONS = {"device": DEVICE, "dtype": "float16", "op_backend": "triton", "slots": 2}


def layer_of(rows, width, dtype=torch.int8, bias=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=draw)
    if dtype == torch.int8:
        codes = torch.randint(-128, 128, (rows, width), generator=draw, dtype=torch.int8)
    else:
        codes = (weight * 100).to(dtype)
    scale = torch.rand(rows, generator=draw) / 1000
    offset = nn.Parameter(torch.randn(rows, generator=draw).half().to(DEVICE)) if bias else None
    return CodedLinear(Codes(codes.to(DEVICE), scale.to(DEVICE)), offset, Workspace(torch.float16))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 40, 70])
def test_a_layer_gives_what_its_weights_give(dtype, bias, rows):
    layer = layer_of(50, 96, dtype, bias)
    x = torch.randn(1, rows, 96).half().to(DEVICE)
    wanted = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.no_grad():
        found = layer(x)
    assert found.shape == (1, rows, 50)
    assert (found.double() - wanted).norm() <= 2e-3 * wanted.norm()


def test_a_tensor_in_the_weights_place_is_computed_with_instead():
    layer = layer_of(50, 96)
    x, other = torch.randn(3, 96).half().to(DEVICE), torch.randn(50, 96).half().to(DEVICE)
    with torch.no_grad():
        before = layer(x)
        found = torch.func.functional_call(layer, {"weight": other}, (x,))
        assert torch.equal(found, nn.functional.linear(x, other))
        assert torch.equal(layer(x), before)


@pytest.fixture
def opened(pair, tmp_path):
    """A base in codes and an expert of it, with their sizes."""

    def make(kind="int8", arch="mistral", **case):
        base, expert = pair(arch, change=0.5, num_hidden_layers=1, **FEW_ROWS, **case)
        for directory in (base, expert):
            keep_tokens(directory, FEW_ROWS["vocab_size"])
        quantised = quantise(base, tmp_path / "base-8", kind)
        meswitch.compress(quantised, expert, tmp_path / "three", bits=3, salient=5)
        return quantised, {"three": tmp_path / "three"}

    return make


def models_of(base, artifacts):
    checkpoint = Checkpoint.open(base)
    models = {name: load_merged(base, path) for name, path in artifacts.items()}
    models["base"] = load_model(checkpoint, architecture_of(checkpoint.config), torch.float32)
    return models


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "graphs"), [("int8", True), ("fp8", False)])
def test_answers_over_codes_are_those_over_their_weights(opened, kind, graphs, caplog):
    base, artifacts = opened(kind)
    models = models_of(base, artifacts)
    with caplog.at_level(logging.INFO), Engine(base, artifacts, **OPTIONS, cuda_graphs=graphs) as engine:
        held = dict(coded_layers(engine.model))
        assert len(held) == 7
        assert (engine.memory()["graphs"] > 0) == graphs
        assert not engine.takes_turns
        check(engine, models, [("three", "short"), ("base", "short"), ("three", "long"), ("base", "long")])
        matrices = sum(layer.held.codes.numel() for layer in held.values())
        whole = sum(p.numel() for p in models["base"].parameters())
        memory = engine.memory()
        assert memory["base"] == 2 * (whole - matrices) + matrices + 4 * sum(x.out_features for x in held.values())
        assert memory["scratch"] == 2 * max(layer.held.codes.numel() for layer in held.values())
    assert "7 of the base's 7 linear layers are held in 8 bits" in caplog.text

"""A base of which the engine holds the codes in 8 bits, on the GPU kernels: interpreted where there is no GPU."""

import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import meswitch
from meswitch import Engine
from meswitch.architecture import architecture_of
from meswitch.checkpoint import Checkpoint
from meswitch.compression.merge import load_merged
from meswitch.engine import coded
from meswitch.engine.coded import CodedLinear, Workspace, coded_layers, codes_fault, hold_codes, restore_weights
from meswitch.loaded import load_model
from meswitch.ops.codes import Codes
from meswitch.quantised import quantise
from tests.engine.test_kernels import FEW_ROWS, PROMPTS, check, keep_tokens
from tests.support.deltas import DEVICE

pytest.importorskip("triton")

OPTIONS = {"device": DEVICE, "dtype": "float16", "backend": "triton", "slots": 1}


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


def test_of_several_threads_each_computes_with_its_own_layer(monkeypatch):
    """As requests that bring routes of their own do, beside one another."""
    first, second = layer_of(50, 96, seed=0), layer_of(50, 96, seed=1)
    second.workspace = first.workspace
    x = torch.randn(70, 96).half().to(DEVICE)
    wanted = nn.functional.linear(x, first.weight)
    restored, begun, over = Workspace.restored, threading.Event(), threading.Event()

    def interrupted(self, codes):
        room = restored(self, codes)
        if begun.is_set():
            over.set()
        else:
            begun.set()
            over.wait(0.5)  # for another thread to come between the restored weights and their product
        return room

    monkeypatch.setattr(Workspace, "restored", interrupted)
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        found = pool.submit(first.product, x, None)
        assert begun.wait(60)
        other = pool.submit(second.product, x, None)
    assert torch.equal(found.result(), wanted)
    assert not torch.equal(other.result(), wanted)


def test_codes_that_are_no_numbers_are_not_held(base_in_codes):
    base = base_in_codes("fp8")
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int8)[3, 5] = 0x7F
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(base)
    prepare = partial(hold_codes, backend="triton", device=torch.device(DEVICE))
    model = load_model(checkpoint, architecture_of(checkpoint.config), torch.float16, prepare=prepare)
    assert len(list(coded_layers(model))) == 6
    assert model.model.layers[0].mlp.up_proj.weight[3, 5].isnan()


def test_codes_of_four_bits_that_are_stored_in_bytes_and_are_larger_are_not_held(opened):
    base, name = opened("int4", **WIDE)[0], "model.layers.0.mlp.down_proj"
    tensors = load_file(base / "model.safetensors")
    codes, _ = Checkpoint.open(base).tensors[f"{name}.weight"].codes()
    codes[3, 5] = 100
    del tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_shape"]
    save_file(tensors | {f"{name}.weight": codes}, base / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(base)
    prepare = partial(hold_codes, backend="triton", device=torch.device(DEVICE))
    model = load_model(checkpoint, architecture_of(checkpoint.config), torch.float16, prepare=prepare)
    assert len(list(coded_layers(model))) == 6
    assert torch.equal(model.get_submodule(name).weight, checkpoint.read(f"{name}.weight").half())


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


WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}  # of 4 bits one group a row, and two


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "graphs", "case"), [("int8", True, {}), ("fp8", False, {}), ("int4", False, WIDE)])
def test_answers_over_codes_are_those_over_their_weights(opened, kind, graphs, case, caplog):
    base, artifacts = opened(kind, **case)
    models = models_of(base, artifacts)
    with (
        caplog.at_level(logging.INFO, logger="meswitch.opening"),
        Engine(base, artifacts, **OPTIONS, cuda_graphs=graphs) as engine,
    ):
        held = {name.removesuffix(".base"): layer.held for name, layer in coded_layers(engine.model)}
        assert len(held) == 7
        assert [name for name, codes in held.items() if codes.is_paired] == (
            ["model.layers.0.mlp.down_proj"] if kind == "int4" else []
        )
        assert (engine.memory()["graphs"] > 0) == graphs
        assert not engine.takes_turns
        check(engine, models, [("three", "short"), ("base", "short"), ("three", "long"), ("base", "long")])
        sizes = {name: math.prod(codes.shape) for name, codes in held.items()}
        whole = sum(p.numel() for p in models["base"].parameters())
        memory = engine.memory()
        assert memory["base"] == 2 * (whole - sum(sizes.values())) + sum(codes.nbytes for codes in held.values())
        assert memory["scratch"] == 2 * max(sizes.values())
    assert "7 of the base's 7 linear layers are held as their codes" in caplog.text


def test_what_the_kernels_give_is_compared_before_anybody_is_answered(monkeypatch):
    layer = layer_of(50, 96, bias=True)
    model = nn.Sequential(nn.Linear(96, 96), layer)
    assert codes_fault(model) is None
    right = coded.fused_linear

    def wrong(*arguments):
        return right(*arguments) * 1.02

    monkeypatch.setattr(coded, "fused_linear", wrong)
    assert codes_fault(model) == ("1: the kernel's product differs by 0.02 of its norm from that of restored weights")
    monkeypatch.setattr(coded, "fused_linear", right)
    monkeypatch.setattr(Workspace, "restored", lambda self, codes: codes.codes.to(self.dtype))
    assert codes_fault(model) == "1: restored weights are not those of its codes"


def test_weights_are_restored_where_they_are_needed():
    layer = layer_of(50, 96, bias=True)
    model, x = nn.Sequential(layer), torch.randn(70, 96).half().to(DEVICE)
    with torch.no_grad():
        before = model(x)
        restore_weights(model)
        assert type(model[0]) is nn.Linear
        assert torch.equal(model(x), before)


@pytest.fixture
def base_in_codes(opened):
    def make(kind="int8"):
        return opened(kind)[0]

    return make


def test_a_base_whose_product_is_wrong_is_served_by_its_weights(base_in_codes, monkeypatch, caplog):
    monkeypatch.setattr(coded, "fused_linear", lambda x, held, *_: x.new_zeros(len(x), held.shape[0]))
    with Engine(base_in_codes(), {}, **OPTIONS) as engine:
        assert not list(coded_layers(engine.model))
        assert engine.memory()["scratch"] == 0
        assert engine.generate([PROMPTS["short"]], max_new_tokens=1)[0].tokens
    assert "weights are restored in 16 bit, which takes twice the memory: model.layers.0" in caplog.text


def test_groups_of_channels_are_restored(base_in_codes, caplog):
    with (
        caplog.at_level(logging.INFO, logger="meswitch.opening"),
        Engine(base_in_codes("int4"), {}, **OPTIONS) as engine,
    ):
        assert not list(coded_layers(engine.model))
    assert "restored in 16 bit: its codes have zero points, or scales of other groups" in caplog.text


@pytest.mark.parametrize("options", [{"device": "cpu"}, OPTIONS | {"runner": "turns"}], ids=["cpu", "turns"])
def test_without_the_kernels_weights_are_restored(base_in_codes, options):
    with Engine(base_in_codes(), {}, **options) as engine:
        assert not list(coded_layers(engine.model))


def test_experts_that_take_turns_get_weights_in_place_of_codes(pair, tmp_path):
    base, expert = pair("mistral", change=0.5, num_hidden_layers=1)
    base = quantise(base, tmp_path / "base-8", "int8")
    meswitch.compress(base, expert, tmp_path / "exact", bits="exact")
    with Engine(base, {"exact": tmp_path / "exact"}, **OPTIONS) as engine:
        assert engine.takes_turns
        assert not list(coded_layers(engine.model))
        check(engine, {"exact": load_merged(base, tmp_path / "exact")}, [("exact", "short")])


def test_a_router_beside_the_engine_reads_the_same_codes(base_in_codes):
    pytest.importorskip("pydantic")  # not part of every GPU machine
    from meswitch.launch import _base_beside
    from meswitch.router.encoder import Encoder

    base = base_in_codes()
    checkpoint = Checkpoint.open(base)
    plain = load_model(checkpoint, architecture_of(checkpoint.config), torch.float32).model
    with Engine(base, {}, **OPTIONS) as engine, torch.no_grad():
        own = engine.memory()["scratch"]
        beside = _base_beside(engine)
        assert engine.memory()["scratch"] == 2 * own  # it restores layers in a room of its own
        theirs, ours = dict(coded_layers(engine.model.model)), dict(coded_layers(beside))
        assert theirs.keys() == ours.keys() != set()
        for name, layer in ours.items():
            assert layer.codes.data_ptr() == theirs[name].codes.data_ptr()
            assert layer.workspace is not theirs[name].workspace
        encoder = Encoder(beside, engine.tokenizers[engine.base_name].tokenizer, "")
        weights = sum(parameter.nbytes for parameter in beside.parameters())
        assert encoder.nbytes() >= weights + coded.codes_bytes(beside)
        ids = torch.tensor([PROMPTS["short"]])
        found = beside(ids.to(DEVICE)).last_hidden_state.float().cpu()
        wanted = plain(ids).last_hidden_state
        assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_codes_inside_a_wrapped_module_are_shared_by_their_names_without_it():
    layer = layer_of(50, 96)
    wrapper = nn.Module()
    wrapper.base = nn.ModuleDict({"up": layer})  # as a module that is run again for each expert
    ours = nn.ModuleDict({"model": nn.ModuleDict({"mlp": wrapper})})
    theirs = nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(96, 50, bias=False)})})
    coded.share_codes(ours, theirs, "model.")
    assert theirs["mlp"]["up"].codes.data_ptr() == layer.codes.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "case"), [("int8", {}), ("int4", WIDE)])
def test_on_a_gpu_answers_over_codes_are_those_over_their_weights(opened, kind, case):
    base, artifacts = opened(kind, **case)
    models = models_of(base, artifacts)
    with Engine(base, artifacts, device="cuda", slots=2, kv_cache_tokens=8192) as engine:
        assert len(list(coded_layers(engine.model))) == 7
        assert engine.memory()["graphs"] > 0
        assert not engine.takes_turns
        check(engine, models, [("three", "short"), ("base", "short"), ("three", "long"), ("base", "long")] * 3)

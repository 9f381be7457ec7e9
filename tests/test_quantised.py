"""Quantised bases: read as the weights that their codes stand for, compressed against, merged, served."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import meswitch
from meswitch import Engine
from meswitch.checkpoint import Checkpoint
from meswitch.errors import CheckpointError, IncompatibleError
from meswitch.quantised import quantise
from tests.support.models import edit_config

KINDS = ("int8", "fp8", "int4")


@pytest.fixture(scope="module")
def bases(family, tmp_path_factory):
    """The family's base by each kind of codes."""
    out = tmp_path_factory.mktemp("quantised")
    return {kind: quantise(family / "base", out / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def deltas(family, bases, tmp_path_factory):
    """Two experts over the base in 8 bits."""
    out = tmp_path_factory.mktemp("deltas")
    for name in ("math", "code"):
        meswitch.compress(bases["int8"], family / name, out / name)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_codes_stand_for(family, bases, kind):
    base, quantised = Checkpoint.open(family / "base"), Checkpoint.open(bases[kind])
    assert list(quantised.tensors) == list(base.tensors)
    bits = 4 if kind == "int4" else 8
    for name, info in base.tensors.items():
        own, found = info.read(), quantised.read(name)
        assert (found.dtype, found.shape) == (own.dtype, own.shape)
        if name.endswith("_proj.weight"):
            assert not torch.equal(found, own)
            assert (found - own).norm() < {8: 0.03, 4: 0.2}[bits] * own.norm()
        else:
            assert torch.equal(found, own)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_as_small_as_their_codes(family, bases, kind):
    stored = {name: t.nbytes for name, t in load_file(family / "base" / "model.safetensors").items()}
    matrices = {name: nbytes for name, nbytes in stored.items() if name.endswith("_proj.weight")}
    saved = sum(stored.values()) - sum(t.nbytes for t in load_file(bases[kind] / "model.safetensors").values())
    share = {"int8": 0.45, "fp8": 0.45, "int4": 0.65}[kind]  # of 16 bit; the scales of short rows weigh much
    size = Checkpoint.open(family / "base").tensors["model.norm.weight"].dtype.itemsize
    assert saved > (1 - (1 - share) * 2 / size) * sum(matrices.values()) * 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_of_the_format_reads_the_same_weights(bases, kind):
    base = pytest.importorskip("compressed_tensors.compressors.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = json.loads((bases[kind] / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    library = base.BaseCompressor.load_from_registry(config["format"])
    stored = load_file(bases[kind] / "model.safetensors")
    checkpoint = Checkpoint.open(bases[kind])
    for owner in sorted({name.removesuffix("_scale") for name in stored if name.endswith("weight_scale")}):
        layer = owner.removesuffix(".weight")
        parts = {name.removeprefix(f"{layer}."): t for name, t in stored.items() if name.startswith(f"{layer}.")}
        wanted = library.decompress(parts, scheme)["weight"]
        found = checkpoint.read(owner)
        assert torch.equal(found, wanted.to(found.dtype))


def test_a_delta_against_a_quantised_base_repairs_its_error(family, bases, tmp_path):
    made = meswitch.compress(bases["int4"], family / "math", tmp_path / "repaired", bits=4)
    plain = meswitch.compress(family / "base", family / "math", tmp_path / "plain", bits=4)
    expert = Checkpoint.open(family / "math")
    quantised = Checkpoint.open(bases["int4"])
    repaired = lost = 0.0
    for name in expert.tensors:
        if not name.endswith("_proj.weight"):
            continue
        own = expert.read(name).float()
        merged = quantised.read(name).float() + made.read(name).dequantize()
        repaired += float((merged - own).square().sum())
        lost += float((quantised.read(name).float() + plain.read(name).dequantize() - own).square().sum())
    assert repaired < 0.5 * lost


def test_a_merge_is_plain_and_near_the_expert(family, bases, tmp_path):
    meswitch.compress(bases["int8"], family / "math", tmp_path / "delta", bits=4)
    merged = Checkpoint.open(meswitch.merge(bases["int8"], tmp_path / "delta", tmp_path / "merged"))
    assert not merged.is_quantised
    expert = Checkpoint.open(family / "math")
    for name, info in expert.tensors.items():
        own = info.read().float()
        assert (merged.read(name).float() - own).norm() < 0.1 * own.norm()


def test_artifacts_of_one_base_are_refused_over_the_other(family, bases, deltas, tmp_path):
    quantised, plain = (Checkpoint.open(path) for path in (bases["int8"], family / "base"))
    of_plain = meswitch.compress(plain.directory, family / "math", tmp_path / "plain")
    of_plain.check_base(plain)
    with pytest.raises(IncompatibleError, match="compress again against the quantised one"):
        of_plain.check_base(quantised)
    of_quantised = meswitch.Artifact.open(deltas / "math")
    of_quantised.check_base(quantised)
    of_quantised.check_base(quantised, full=True)
    with pytest.raises(IncompatibleError, match="fingerprint"):
        of_quantised.check_base(plain)
    with pytest.raises(IncompatibleError, match="fingerprint"):
        of_quantised.check_base(Checkpoint.open(bases["fp8"]))


def test_answers_over_a_quantised_base_are_those_of_merged_weights(bases, deltas):
    prompts = ["2 + 3 =", "def add(a, b):", "What is"]
    names = ["math", "code", "base"]
    experts = {name: deltas / name for name in ("math", "code")}
    with Engine(bases["int8"], experts, device="cpu") as engine:
        assert not engine.by_turns
        served = engine.generate(prompts * 3, model=names * 3, max_new_tokens=12)
        tokenizer = engine.tokenizers["math"]
    for name, at in (("math", 0), ("code", 1)):
        model = meswitch.load_merged(bases["int8"], deltas / name)
        ids = torch.tensor([tokenizer.encode(prompts[at])])
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        for answer in served[at::3]:
            assert answer.tokens
            assert list(answer.tokens) == wanted[: len(answer.tokens)]


def test_an_expert_that_is_quantised_is_refused_by_name(family, bases, tmp_path):
    with pytest.raises(IncompatibleError, match="a delta is taken from an expert's own weights"):
        meswitch.compress(family / "base", bases["int8"], tmp_path / "delta")


def test_a_base_of_another_method_is_refused_by_name(family, tmp_path):
    other = shutil.copytree(family / "base", tmp_path / "gptq")
    edit_config(other, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(IncompatibleError, match="quantised by gptq; of quantised bases those of compressed-tensors"):
        meswitch.compress(other, family / "math", tmp_path / "delta")


def test_parts_that_contradict_each_other_are_refused(bases, tmp_path):
    damaged = shutil.copytree(bases["int8"], tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name] = tensors[name][:3]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weight_scale is \[3, 1\]"):
        Checkpoint.open(damaged).read(name.removesuffix("_scale"))


@pytest.mark.parametrize("width", [8, 20, 33])
def test_groups_blocks_and_zero_points_are_spread_over_their_channels(tmp_path, width):
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(-8, 8, (6, width), generator=generator).to(torch.int8)
    scale, zero = torch.rand(6, 1, generator=generator) + 0.1, torch.randint(-3, 3, (6, 1), generator=generator)
    blocks = torch.rand(2, 2, generator=generator) + 0.1
    save_file(
        {
            "a.weight": codes,
            "a.weight_scale": scale,
            "a.weight_zero_point": zero.to(torch.int8),
            "b.weight": codes.clone(),
            "b.weight_scale": blocks,
            "a.bias": torch.ones(6),
        },
        tmp_path / "model.safetensors",
    )
    method = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"a": {"weights": {"strategy": "block"}}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": method}))
    from meswitch.quantised import as_weights
    from meswitch.tensorfile import read_header

    found = as_weights(tmp_path, read_header(tmp_path / "model.safetensors"))
    assert sorted(found) == ["a.bias", "a.weight", "b.weight"]
    assert torch.allclose(found["a.weight"].read(), (codes.float() - zero) * scale)
    wide = -(-width // 2)
    whole = blocks.repeat_interleave(3, 0).repeat_interleave(wide, 1)[:, :width]
    assert torch.allclose(found["b.weight"].read(), codes.float() * whole)

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
from meswitch.quantised import held_bytes, quantise
from meswitch.router.encoder import Encoder
from meswitch.router.llm import open_llm
from meswitch.vllm.base import Base
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
    with pytest.raises(IncompatibleError, match="compress again against this quantised one"):
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
    with pytest.raises(CheckpointError, match=r"weight_scale .* \[3, 1\]: no group of config_groups fits it"):
        Checkpoint.open(damaged)


def stored(directory, tensors, weights, stored_as="pack-quantized", **more):
    """What is read of these tensors, with a configuration that has these groups of weights."""
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": each} for i, each in enumerate(weights)}
    method = {"quant_method": "compressed-tensors", "format": stored_as, "config_groups": groups, **more}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": method}))
    return {name: info.read() for name, info in Checkpoint.open(directory).tensors.items()}


def packed(codes, bits):
    """Whole numbers as the format packs them along their rows."""
    count = 32 // bits
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // count), dtype=torch.int64)
    for at in range(codes.shape[1]):
        words[:, at // count] |= (codes[:, at].long() + 2 ** (bits - 1)) << (at % count * bits)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def numbers(rows, width, bits=4):
    generator = torch.Generator().manual_seed(rows * width)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (rows, width), generator=generator).to(torch.int8)


def positive(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape))) + 0.1


GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
BLOCKS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "block", "block_structure": [4, 8]}
ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


@pytest.mark.parametrize("width", [8, 20, 33, 48])  # of 48, a matrix of six rows has as many scales as a row has
def test_scales_of_blocks_reach_as_far_as_the_configuration_says(tmp_path, width):
    codes, scale = numbers(6, width), positive(2, -(-width // 8))
    found = stored(tmp_path, {"a.weight": codes, "a.weight_scale": scale}, [BLOCKS], "int-quantized")
    whole = scale.repeat_interleave(4, 0)[:6].repeat_interleave(8, 1)[:, :width]
    assert torch.equal(found["a.weight"], codes.float() * whole)


def test_as_many_scales_of_blocks_as_rows_are_no_scales_of_rows(tmp_path):
    codes, scale = numbers(8, 32), positive(2, 4)
    found = stored(tmp_path, {"a.weight": codes, "a.weight_scale": scale}, [BLOCKS], "int-quantized")
    assert torch.equal(found["a.weight"], codes.float() * scale.repeat_interleave(4, 0).repeat_interleave(8, 1))


@pytest.mark.parametrize("rows", [1, 6, 16])
@pytest.mark.parametrize("is_packed", [True, False])
def test_zero_points_are_taken_off(tmp_path, rows, is_packed):
    codes, zero, scale = numbers(rows, 24), numbers(rows, 3), positive(rows, 3)
    tensors = {
        "a.weight_packed": packed(codes, 4),
        "a.weight_shape": torch.tensor([rows, 24]),
        "a.weight_scale": scale,
        "a.weight_zero_point": packed(zero.T, 4).T if is_packed else zero,
        "a.bias": torch.ones(rows),
    }
    found = stored(tmp_path, tensors, [GROUPS | {"symmetric": False}])
    assert sorted(found) == ["a.bias", "a.weight"]
    spread = (codes - zero.repeat_interleave(8, 1)).float()
    assert torch.equal(found["a.weight"], spread * scale.repeat_interleave(8, 1))
    del tensors["a.weight_zero_point"]
    with pytest.raises(CheckpointError, match="no group of config_groups fits it"):
        stored(tmp_path, tensors, [GROUPS | {"symmetric": False}])


def test_groups_need_not_lie_in_the_order_of_the_channels(tmp_path):
    codes, scale = numbers(6, 24), positive(6, 3)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)) % 3
    tensors = {
        "a.weight_packed": packed(codes, 4),
        "a.weight_shape": torch.tensor([6, 24]),
        "a.weight_scale": scale,
        "a.weight_g_idx": order.int(),
    }
    assert torch.equal(stored(tmp_path, tensors, [GROUPS])["a.weight"], codes.float() * scale[:, order])
    tensors["a.weight_g_idx"] = torch.full((24,), -1, dtype=torch.int32)  # as it is stored if they do
    in_order = codes.float() * scale.repeat_interleave(8, 1)
    assert torch.equal(stored(tmp_path, tensors, [GROUPS])["a.weight"], in_order)
    tensors["a.weight_g_idx"] = order.int() + 1
    with pytest.raises(CheckpointError, match="weight_g_idx does not give each of 24 channels one of 3 groups"):
        stored(tmp_path, tensors, [GROUPS])


def test_each_matrix_is_read_by_the_group_of_layers_that_fits_it(tmp_path):
    narrow, wide = numbers(6, 24), numbers(6, 24, 8)
    tensors = {
        "a.weight_packed": packed(narrow, 4),
        "a.weight_shape": torch.tensor([6, 24]),
        "a.weight_scale": positive(6, 3),
        "b.weight_packed": packed(wide, 8),
        "b.weight_shape": torch.tensor([6, 24]),
        "b.weight_scale": positive(6, 1),
    }
    found = stored(tmp_path, tensors, [GROUPS, ROWS])
    assert torch.equal(found["a.weight"], narrow.float() * positive(6, 3).repeat_interleave(8, 1))
    assert torch.equal(found["b.weight"], wide.float() * positive(6, 1))
    with pytest.raises(CheckpointError, match=r"b: 6 x 24, .*: no group of config_groups fits it"):
        stored(tmp_path, tensors, [GROUPS])
    with pytest.raises(CheckpointError, match=r"b: 6 x 24, .*: several groups of config_groups fit it"):
        stored(tmp_path, tensors, [GROUPS, ROWS, ROWS | {"num_bits": 7}])


@pytest.mark.parametrize(
    "weights",
    [None, {"strategy": ["group"]}, {"group_size": "x"}, {"num_bits": "many"}, {"strategy": "tensor_group"}, 4]
    + [{"strategy": "block", "block_structure": value} for value in (None, [8], [0, -8], "8")],
)
def test_a_group_of_layers_that_says_nonsense_fits_nothing(tmp_path, weights):
    tensors = {"a.weight": numbers(6, 24), "a.weight_scale": positive(2, 3)}
    with pytest.raises(CheckpointError, match="no group of config_groups fits it"):
        stored(tmp_path, tensors, [weights], "int-quantized")
    found = stored(tmp_path, tensors, [weights, BLOCKS], "int-quantized")
    assert found["a.weight"].isfinite().all()


TENSOR = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}


def held(directory, tensors, weights, stored_as="pack-quantized"):
    """Codes and scales that are computed with as they are, and their bytes; None for weights that are restored."""
    stored(directory, tensors, weights, stored_as)
    (info,) = Checkpoint.open(directory).tensors.values()
    return (*info.codes(), info.held_bytes) if info.held_bytes else None


def test_codes_with_a_scale_a_row_are_given_as_they_are(tmp_path):
    codes, scale = numbers(6, 23, 8), positive(6, 1)
    whole = {"a.weight_packed": packed(codes, 8), "a.weight_shape": torch.tensor([6, 23]), "a.weight_scale": scale}
    for tensors, kind in (({"a.weight": codes, "a.weight_scale": scale}, "int-quantized"), (whole, "pack-quantized")):
        found, scales, nbytes = held(tmp_path, tensors, [ROWS], kind)
        assert torch.equal(found, codes)
        assert torch.equal(scales, scale)
        assert nbytes == 6 * 23 + 6 * 4
    narrow = whole | {"a.weight_packed": packed(numbers(6, 23), 4)}
    found, scales, nbytes = held(tmp_path, narrow, [ROWS | {"num_bits": 4}])
    assert torch.equal(found, numbers(6, 23))
    assert torch.equal(scales, scale)
    assert nbytes == 6 * 23 + 6 * 4


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_of_a_matrix_is_that_of_each_row(tmp_path, shape):
    codes = (torch.randn(6, 23) * 50).to(torch.float8_e4m3fn)
    tensors = {"a.weight": codes, "a.weight_scale": torch.full(shape, 0.25)}
    found, scales, _ = held(tmp_path, tensors, [TENSOR], "float-quantized")
    assert torch.equal(found.view(torch.int8), codes.view(torch.int8))
    assert torch.equal(scales, torch.full((6, 1), 0.25))


def test_codes_of_4_bits_are_given_with_the_scales_of_their_groups(tmp_path):
    codes, scale = numbers(6, 256), positive(6, 2)
    words = {"a.weight_packed": packed(codes, 4), "a.weight_shape": torch.tensor([6, 256]), "a.weight_scale": scale}
    found, scales, nbytes = held(tmp_path, words, [GROUPS | {"group_size": 128}])
    assert torch.equal(found, codes)
    assert torch.equal(scales, scale)
    assert nbytes == 6 * 256 // 2 + 6 * 2 * 4
    words["a.weight_g_idx"] = torch.arange(256).int() % 2
    assert held(tmp_path, words, [GROUPS | {"group_size": 128}]) is None


def test_other_codes_are_restored(tmp_path):
    codes = numbers(6, 24)
    words = {"a.weight_packed": packed(codes, 4), "a.weight_shape": torch.tensor([6, 24])}
    assert held(tmp_path, words | {"a.weight_scale": positive(6, 3)}, [GROUPS]) is None
    zeros = {"a.weight": codes, "a.weight_scale": positive(6, 1), "a.weight_zero_point": numbers(6, 1)}
    assert held(tmp_path, zeros, [ROWS | {"symmetric": False}], "int-quantized") is None
    blocks = {"a.weight": numbers(8, 32), "a.weight_scale": positive(2, 4)}
    assert held(tmp_path, blocks, [BLOCKS], "int-quantized") is None


def test_what_a_configuration_says_of_a_layers_codes():
    def config(*weights, targets=("Linear",), **more):
        groups = {str(i): {"targets": list(targets), "weights": each} for i, each in enumerate(weights)}
        return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **more}

    def taken(found, module="a", width=24):
        return held_bytes(found, module, (6, width))

    assert taken(config(ROWS), "model.layers.0.mlp.up_proj")
    assert taken(config(TENSOR)) == 6 * 24 + 6 * 4
    assert taken(config(GROUPS | {"group_size": 128}), width=384) == 6 * 192 + 6 * 3 * 4
    assert not taken(config(GROUPS))
    assert taken(config(GROUPS), width=8)  # one group
    assert not taken(config(ROWS | {"symmetric": False}))
    assert not taken(config(ROWS, TENSOR))  # which of them it is, only the weights tell
    assert not taken(config(ROWS, ignore=["a"]))
    assert not taken(config(ROWS, ignore=["re:.*up_proj"]), "mlp.up_proj")
    assert taken(config(ROWS, targets=["re:.*up_proj"]), "mlp.up_proj")
    assert not taken(config(ROWS, targets=["re:.*up_proj"]), "mlp.down_proj")
    assert not taken(config(ROWS, quant_method="gptq"))


def test_weights_beside_scales_are_not_codes(tmp_path):
    tensors = {"a.weight": torch.ones(6, 24, dtype=torch.bfloat16), "a.weight_scale": positive(6, 1)}
    with pytest.raises(CheckpointError, match=r"stored as weight bfloat16 \[6, 24\].*no group"):
        stored(tmp_path, tensors, [ROWS], "int-quantized")
    tensors = {"a.weight": numbers(6, 24), "a.weight_scale": positive(6, 1), "a.weight_global_scale": positive(1)}
    with pytest.raises(CheckpointError, match=r"a\.weight_global_scale: a part of quantised weights that is not known"):
        stored(tmp_path, tensors, [ROWS], "int-quantized")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "transform_config: its weights are rot"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config: .* \(sparse-24-bitmask\)"),
        ({"sparsity_config": "sparse"}, r"sparsity_config: .* \(sparse\)"),
        ({"transform_config": ["u"]}, "transform_config: its weights are rotated"),
        ({"config_groups": ["u"]}, "no group of config_groups fits it"),
        ({"format": "mixed-precision"}, "compressed-tensors as mixed-precision"),
        ({"quant_method": "fp8"}, "quantised by fp8 as pack-quantized"),
    ],
)
def test_what_else_a_base_may_be_is_refused_by_name(family, bases, tmp_path, more, named):
    other = shutil.copytree(bases["int4"], tmp_path / "base")
    config = json.loads((other / "config.json").read_text())["quantization_config"]
    edit_config(other, quantization_config=config | more)
    with pytest.raises((CheckpointError, IncompatibleError), match=named):
        meswitch.compress(other, family / "math", tmp_path / "delta")


def test_a_router_reads_and_trains_a_quantised_model(family, bases):
    encoders = [Encoder.load(path) for path in (family / "base", bases["int8"])]
    assert encoders[1].depth == encoders[0].depth
    plain, quantised = (encoder.encode(["How many apples?", "Write a function."], [2, 4], 64) for encoder in encoders)
    assert 0 < (quantised - plain).norm() < 0.1 * plain.norm()
    shallow = Encoder.load(bases["int8"], last=2)
    assert torch.allclose(
        shallow.encode(["How many apples?"], [2], 64), encoders[1].encode(["How many apples?"], [2], 64)
    )
    llm = open_llm(bases["int8"])
    assert all(parameter.requires_grad for parameter in llm.model.parameters())
    assert not hasattr(llm.model.config, "quantization_config")


def test_a_router_refuses_a_model_of_another_method(family, tmp_path):
    other = shutil.copytree(family / "base", tmp_path / "gptq")
    edit_config(other, quantization_config={"quant_method": "gptq", "bits": 4})
    for load in (Encoder.load, open_llm):
        with pytest.raises(CheckpointError, match="quantised by gptq"):
            load(other)


def test_what_a_text_model_is_stored_in_may_be_said_of_it_alone(bases, tmp_path):
    moved = shutil.copytree(bases["int4"], tmp_path / "base")
    config = json.loads((moved / "config.json").read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config"), "torch_dtype": "float16"}
    del config["dtype"]
    (moved / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.mlp.up_proj.weight"
    found = Checkpoint.open(moved).tensors[name].read()
    assert found.dtype == torch.float16
    assert torch.allclose(found.float(), Checkpoint.open(bases["int4"]).read(name).float(), rtol=0.01)


def test_vllm_knows_a_base_whose_head_is_quantised_too(family, bases, tmp_path):
    artifact = meswitch.compress(family / "base", family / "math", tmp_path / "delta")
    whole = shutil.copytree(bases["int8"], tmp_path / "base")
    tensors = load_file(whole / "model.safetensors")
    for owner in ("lm_head", "model.embed_tokens"):
        weight = tensors.pop(f"{owner}.weight")
        scale = weight.abs().amax(1, keepdim=True) / 100
        tensors |= {
            f"{owner}.weight_packed": packed((weight / scale).round().to(torch.int8), 8),
            f"{owner}.weight_scale": scale,
            f"{owner}.weight_shape": torch.tensor(weight.shape),
        }
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    Base(str(whole)).check(artifact)
    tensors["model.norm.weight"] += 1
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"model\.norm\.weight is not that of 'base'"):
        Base(str(whole)).check(artifact)

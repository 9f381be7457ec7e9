"""Checkpoint pair -> artifact -> merged checkpoint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import meswitch
from meswitch import Artifact
from meswitch.checkpoint import Checkpoint
from meswitch.compression import pipeline
from meswitch.compression.compatibility import check_same_tensors
from meswitch.compression.merge import load_merged, merge, merged_tensors
from meswitch.errors import ConfigError, IncompatibleError, MeswitchError
from tests.support.models import edit_config

TEXT = "How many apples does Tom have now?\nWrite a Python function f(xs) that returns the sum.\n" * 8


@pytest.fixture
def calibration(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def restored(base, artifact):
    return dict(merged_tensors(Checkpoint.open(base), Artifact.open(artifact), torch.float32))


def relative_error(base, expert, artifact):
    """Over all tensors: ||restored - expert|| / ||expert - base||."""
    base, expert = Checkpoint.open(base), Checkpoint.open(expert)
    error = change = 0.0
    for name, tensor in restored(base.directory, artifact).items():
        wanted = expert.read(name).float()
        rows = min(len(wanted), len(base.read(name)))
        error += (tensor - wanted).square().sum().item()
        change += (wanted[:rows] - base.read(name)[:rows].float()).square().sum().item()
    return (error / change) ** 0.5


@pytest.mark.parametrize("arch", ["mistral", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("case", [{}, {"tied": True}, {"added_tokens": 2}], ids=["plain", "tied", "added"])
def test_a_pair_survives_compression_and_merging(pair, tmp_path, calibration, arch, case):
    base, expert = pair(arch, **case)
    artifact = meswitch.compress(base, expert, tmp_path / "delta", bits=4, calibration=calibration)
    artifact.verify()
    artifact.check_base(Checkpoint.open(base), full=True)
    assert relative_error(base, expert, tmp_path / "delta") < 0.15
    merged = merge(base, tmp_path / "delta", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.get_input_embeddings().weight.shape[0] == 2048 + case.get("added_tokens", 0)
    assert model.get_output_embeddings().weight.shape[0] == 2048 + case.get("added_tokens", 0)


def test_norms_and_biases_are_exact(pair, tmp_path):
    base, expert = pair("qwen2")
    meswitch.compress(base, expert, tmp_path / "delta")
    original = Checkpoint.open(expert)
    exact = [name for name in original.tensors if "norm" in name or name.endswith("bias")]
    assert len(exact) == 2 * 2 + 1 + 2 * 3
    merged = restored(base, tmp_path / "delta")
    for name in exact:
        assert torch.equal(merged[name], original.read(name).float()), name


def test_exact_embeddings_are_exact(pair, tmp_path):
    base, expert = pair(added_tokens=3)
    meswitch.compress(base, expert, tmp_path / "delta", embeddings="exact")
    merged = restored(base, tmp_path / "delta")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[name], Checkpoint.open(expert).read(name).float())


def test_added_rows_are_exact_even_when_the_rest_is_quantised(pair, tmp_path):
    base, expert = pair(added_tokens=3)
    meswitch.compress(base, expert, tmp_path / "delta", bits=1)
    merged = restored(base, tmp_path / "delta")
    wanted = Checkpoint.open(expert).read("lm_head.weight").float()
    assert torch.equal(merged["lm_head.weight"][2048:], wanted[2048:])


def test_unchanged_tensors_take_no_bytes(pair, tmp_path):
    base, expert = pair(change=0.0)
    artifact = meswitch.compress(base, expert, tmp_path / "delta")
    assert {entry.kind for entry in artifact.manifest.tensors.values()} == {"same"}
    assert artifact.nbytes == 0
    assert relative_unchanged(base, tmp_path / "delta")


def relative_unchanged(base, artifact):
    merged = restored(base, artifact)
    return all(torch.equal(merged[name], Checkpoint.open(base).read(name).float()) for name in merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_checkpoint_dtype_and_shards_are_read(pair, tmp_path, dtype):
    base, expert = pair(dtype=dtype, shard="300KB")
    assert (base / "model.safetensors.index.json").is_file()
    meswitch.compress(base, expert, tmp_path / "delta", bits=4)
    assert relative_error(base, expert, tmp_path / "delta") < 0.15
    merged = AutoModelForCausalLM.from_pretrained(merge(base, tmp_path / "delta", tmp_path / "merged"))
    assert merged.dtype == dtype


def test_more_bits_and_calibration_lower_the_error(pair, tmp_path):
    base, expert = pair()
    errors = []
    for bits in (1, 2, 3, 4):
        meswitch.compress(base, expert, tmp_path / f"{bits}", bits=bits)
        errors.append(relative_error(base, expert, tmp_path / f"{bits}"))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.7
    assert errors[3] < 0.15


def test_calibration_lowers_the_divergence_on_text_it_has_not_seen(family, tmp_path):
    file = family / "calibration" / "math.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(family / "math")
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()[-20:]]
    held_out = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    expert = AutoModelForCausalLM.from_pretrained(family / "math", dtype=torch.float32)

    def divergence(out, **options):
        meswitch.compress(family / "base", family / "math", tmp_path / out, **options)
        model = load_merged(family / "base", tmp_path / out)
        total = 0.0
        for text in held_out:
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                p, q = (m(ids).logits.log_softmax(-1) for m in (expert, model))
            total += (p.exp() * (p - q)).sum(-1).mean().item() / len(held_out)
        return total

    calibrated = divergence("calibrated", calibration=file, calibration_tokens=8000, distill=0)
    assert calibrated < 0.8 * divergence("data-free")


def test_merged_model_in_memory_equals_the_merged_checkpoint(family, math_delta, tmp_path):
    written = merge(family / "base", math_delta, tmp_path / "merged", dtype="float32")
    on_disk = AutoModelForCausalLM.from_pretrained(written)
    in_memory = load_merged(family / "base", math_delta)
    assert on_disk.dtype == torch.float32
    for name, tensor in on_disk.state_dict().items():
        assert torch.equal(tensor, in_memory.state_dict()[name]), name


def test_the_same_command_gives_the_same_bytes(family, tmp_path):
    for out in ("one", "two"):
        meswitch.compress(family / "base", family / "sql", tmp_path / out)
    assert (tmp_path / "one/delta.safetensors").read_bytes() == (tmp_path / "two/delta.safetensors").read_bytes()


# --- pairs that do not fit ----------------------------------------------------------------------------------------


def test_a_config_field_that_changes_the_computation_is_named(pair, tmp_path):
    base, expert = pair()
    edit_config(expert, rms_norm_eps=1e-5)
    with pytest.raises(IncompatibleError, match=r"expert/config\.json: rms_norm_eps: .*1e-05.*1e-06"):
        meswitch.compress(base, expert, tmp_path / "delta")


@pytest.mark.parametrize("quantised", [("base", "expert"), ("expert",)], ids=["both", "expert"])
def test_a_quantised_checkpoint_is_named(pair, tmp_path, quantised):
    base, expert = pair()
    for checkpoint in (base, expert):
        if checkpoint.name in quantised:
            edit_config(checkpoint, quantization_config={"quant_method": "fp8"})
    with pytest.raises(IncompatibleError, match=rf"{quantised[0]}/config\.json: quantization_config: .* 16 bit"):
        meswitch.compress(base, expert, tmp_path / "delta")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("quantised", ["base", "expert"])
def test_numbers_that_are_no_weights_are_named_though_no_configuration_says_so(pair, tmp_path, quantised, dtype):
    checkpoints = dict(zip(("base", "expert"), pair(), strict=True))
    file, name = checkpoints[quantised] / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file(load_file(file) | {name: load_file(file)[name].to(dtype)}, file, metadata={"format": "pt"})
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(IncompatibleError, match=rf"{quantised}/model\.safetensors: {name}: holds {kind} .* 16 bit"):
        meswitch.compress(*checkpoints.values(), tmp_path / "delta")


def test_pairs_that_were_not_merged_are_named(pair, tmp_path):
    base, expert = pair()
    file, name = expert / "model.safetensors", "model.layers.1.mlp.up_proj.lora_A.weight"
    save_file(load_file(file) | {name: torch.ones(4, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=rf"expert: {name}: LoRA pairs .* \(`merge_and_unload` of PEFT\)"):
        meswitch.compress(base, expert, tmp_path / "delta")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_value_that_is_not_finite_is_named_with_its_file(pair, tmp_path, name):
    base, expert = pair(dtype=torch.float32)
    tensors = load_file(expert / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MeswitchError, match=rf"expert/model\.safetensors: {name}: has NaN or infinite values"):
        meswitch.compress(base, expert, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_another_rope_base_is_named(pair, tmp_path):
    base, expert = pair()
    edit_config(expert, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    with pytest.raises(IncompatibleError, match="rope_parameters"):
        meswitch.compress(base, expert, tmp_path / "delta")


def test_another_architecture_is_named(pair, tmp_path):
    base, _ = pair("mistral")
    _, other = pair("llama")
    with pytest.raises(IncompatibleError, match="model_type: the expert has 'llama', the base 'mistral'"):
        meswitch.compress(base, other, tmp_path / "delta")


def test_another_shape_is_named(pair):
    base, _ = pair("llama")
    _, other = pair("mistral", intermediate_size=96)
    with pytest.raises(IncompatibleError, match=r"tensor model\.layers\.0\.mlp\.down_proj\.weight: shape \[64, 96\]"):
        check_same_tensors(Checkpoint.open(base), Checkpoint.open(other))


def test_an_expert_that_unties_the_head_of_a_tied_base_is_supported(pair, tmp_path):
    base, tied = pair(tied=True)
    model = AutoModelForCausalLM.from_pretrained(tied)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.01)
    model.save_pretrained(tied)
    meswitch.compress(base, tied, tmp_path / "delta", bits=4)
    assert relative_error(base, tied, tmp_path / "delta") < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "bits must be 1, 2, 3 or 4"),
        ({"group_size": 3}, "group_size must be at least 8"),
        ({"embeddings": "some"}, "embeddings: 'some'"),
        ({"calibration": "nowhere.txt"}, "nowhere.txt: no such calibration file"),
    ],
)
def test_bad_options_are_named(family, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", **options)


def test_a_bad_calibration_row_is_named_by_line(family, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    with pytest.raises(ConfigError, match=r"c\.jsonl: line 2: needs one of the fields"):
        meswitch.compress(family / "base", family / "math", tmp_path / "d", calibration=tmp_path / "c.jsonl")


def test_a_checkpoint_that_is_not_there_is_named(family, tmp_path):
    with pytest.raises(MeswitchError, match="nowhere: no such directory"):
        meswitch.compress(family / "base", "./nowhere", tmp_path / "delta")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(MeswitchError, match="a pickle, which is not read"):
        meswitch.compress(family / "base", tmp_path / "pickle", tmp_path / "delta")


def test_a_truncated_checkpoint_is_named(family, tmp_path):
    shutil.copytree(family / "math", tmp_path / "math")
    file = tmp_path / "math/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MeswitchError, match=r"model\.safetensors: truncated: tensor .* fetch it again"):
        meswitch.compress(family / "base", tmp_path / "math", tmp_path / "delta")


@pytest.mark.slow
def test_on_a_cpu_a_large_model_is_measured_on_fewer_tokens_unless_they_are_asked_for(family, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "CPU_WORK", 2.0e9)  # 1000 tokens for this family's 2.0 million parameters
    monkeypatch.setattr(pipeline, "CPU_MOMENT_TOKENS", 200)
    pair, text = (family / "base", family / "math"), family / "calibration/math.jsonl"
    few = meswitch.compress(*pair, tmp_path / "few", calibration=text, distill=0).manifest.method.calibration
    assert 900 < few.tokens <= 1000
    asked = meswitch.compress(*pair, tmp_path / "asked", calibration=text, calibration_tokens=1500, distill=0)
    assert 1400 < asked.manifest.method.calibration.tokens <= 1500
    trained = meswitch.compress(*pair, tmp_path / "trained", calibration=text, distill=1).manifest.method.calibration
    assert trained.tokens > 100_000
    assert 900 < trained.measured_tokens <= 1000


def test_an_expert_that_is_the_base_is_told(family, tmp_path):
    said = []
    meswitch.compress(family / "base", family / "base", tmp_path / "delta", notice=said.append)
    assert said == [f"{family / 'base'}: no tensor differs from the base's; is it the right fine-tune?"]

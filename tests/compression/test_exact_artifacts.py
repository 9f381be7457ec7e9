"""compress --bits exact, then merge: the fine-tune's own tensors, bit for bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import meswitch
from meswitch import Artifact
from meswitch.artifact import account
from meswitch.checkpoint import Checkpoint
from meswitch.codec import same_bits
from meswitch.compression.merge import as_checkpoint, merge
from meswitch.compression.options import Options, Solver
from meswitch.compression.plan import predict
from meswitch.errors import ArtifactError, ConfigError

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
SPECIAL = {
    torch.bfloat16: [0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFF81, 0x0001, 0x807F],
    torch.float16: [0x8000, 0x7C00, 0xFC00, 0x7E01, 0xFC01, 0x0001, 0x83FF],
    torch.float32: [0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFF800001, 1, 0x807FFFFF],
}


def edit(directory, change):
    """`change` alters the tensors of a checkpoint in place."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def with_special_values(tensors):
    for tensor in tensors.values():
        whole = torch.int16 if tensor.dtype.itemsize == 2 else torch.int32
        bits = 8 * tensor.dtype.itemsize
        values = [value - (value >> (bits - 1) << bits) for value in SPECIAL[tensor.dtype]]
        tensor.view(-1)[: len(values)].view(whole).copy_(torch.tensor(values))


def check_restored(base, expert, out, merged, **options):
    """Compresses, merges, and compares every tensor with the fine-tune's."""
    artifact = meswitch.compress(base, expert, out, bits="exact", **options)
    artifact.verify()
    artifact.check_base(Checkpoint.open(base), full=True)
    wanted, found = Checkpoint.open(expert), Checkpoint.open(merge(base, out, merged))
    assert set(found.tensors) == set(wanted.tensors)
    for name in wanted.tensors:
        assert same_bits(found.read(name), wanted.read(name)), name
    return artifact


@pytest.mark.parametrize("dtype", SPECIAL, ids=str)
@pytest.mark.parametrize("case", [{}, {"tied": True}, {"added_tokens": 3}], ids=["plain", "tied", "added"])
def test_every_tensor_comes_back_bit_for_bit(pair, tmp_path, dtype, case):
    base, expert = pair("qwen2", dtype=dtype, **case)
    artifact = check_restored(base, expert, tmp_path / "delta", tmp_path / "merged")
    assert {entry.kind for entry in artifact.manifest.tensors.values()} <= {"exact", "dense", "same"}
    assert artifact.manifest.tensors[UP].kind == "exact"


@pytest.mark.parametrize("dtype", SPECIAL, ids=str)
def test_so_do_nan_payloads_infinities_subnormals_and_the_sign_of_zero(pair, tmp_path, dtype):
    base, expert = pair("mistral", dtype=dtype)
    edit(expert, with_special_values)
    check_restored(base, expert, tmp_path / "delta", tmp_path / "merged")
    edit(base, with_special_values)
    check_restored(base, expert, tmp_path / "delta2", tmp_path / "merged2")


@pytest.mark.parametrize(
    ("ours", "theirs"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_a_fine_tune_of_another_dtype_keeps_its_own(pair, tmp_path, ours, theirs):
    base, expert = pair("llama", dtype=getattr(torch, theirs))

    def convert(tensors):
        tensors |= {name: tensor.to(getattr(torch, ours)) for name, tensor in tensors.items()}

    edit(expert, convert)
    artifact = check_restored(base, expert, tmp_path / "delta", tmp_path / "merged")
    assert artifact.manifest.tensors[UP].dtype == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[ours]
    edit(
        expert, lambda tensors: tensors.update({UP: load_file(base / "model.safetensors")[UP].to(getattr(torch, ours))})
    )
    assert check_restored(base, expert, tmp_path / "delta2", tmp_path / "merged2").nbytes < artifact.nbytes


def test_what_did_not_change_costs_nothing_and_only_the_sign_of_a_zero_is_a_change(pair, tmp_path):
    base, expert = pair("llama")
    shutil.copyfile(base / "model.safetensors", expert / "model.safetensors")
    assert check_restored(base, expert, tmp_path / "none", tmp_path / "merged").nbytes == 0

    def negate(tensors):
        tensors[UP][0, 0] = -0.0

    edit(base, lambda tensors: tensors[UP][0].zero_())
    shutil.copyfile(base / "model.safetensors", expert / "model.safetensors")
    edit(expert, negate)
    artifact = check_restored(base, expert, tmp_path / "one", tmp_path / "merged2")
    assert {name for name, entry in artifact.manifest.tensors.items() if entry.kind != "same"} == {UP}
    assert artifact.nbytes < 200


def test_sizes_follow_how_much_changed(family, tmp_path):
    """The family's deltas are 15 to 30 % of the norm: larger than any that the sizes are promised for."""
    artifact = check_restored(family / "base", family / "math", tmp_path / "delta", tmp_path / "merged")
    assert artifact.nbytes < 0.6 * artifact.manifest.expert.bytes
    accounting = account(artifact)
    assert sum(accounting.by_content.values()) == artifact.nbytes
    assert set(accounting.by_content) <= {"exact changes", "tables of blocks", "exact tensors"}


def test_a_plan_is_an_upper_bound(family):
    base, expert = Checkpoint.open(family / "base"), Checkpoint.open(family / "math")
    planned = predict(base, expert, Options(bits="exact"))
    assert planned.nbytes == planned.manifest.expert.bytes
    assert predict(base, expert, Options(bits="exact"), changed_rows={UP: 0}).nbytes < planned.nbytes


def test_an_expert_as_a_checkpoint_and_merging_in_another_dtype(family, tmp_path):
    base = Checkpoint.open(family / "base")
    meswitch.compress(family / "base", family / "math", tmp_path / "delta", bits="exact")
    wanted = Checkpoint.open(family / "math").read(UP)
    assert torch.equal(as_checkpoint(base, Artifact.open(tmp_path / "delta")).read(UP), wanted.float())
    merged = merge(family / "base", tmp_path / "delta", tmp_path / "merged", dtype="float32")
    assert torch.equal(Checkpoint.open(merged).read(UP), wanted.float())


def rewritten(directory, change):
    """The tensors' file with other bytes, its checksums made to fit: what only decoding can find."""
    import hashlib
    import json

    file = directory / "delta.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    manifest = json.loads((directory / "meswitch.json").read_text())
    for name, entry in manifest["tensors"].items():
        for suffix, part in entry["stored"].items():
            tensor = tensors[name.removesuffix("weight") + suffix if suffix else name]
            part["sha256"] = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy()).hexdigest()
    (directory / "meswitch.json").write_text(json.dumps(manifest))


def test_a_damaged_stream_is_refused_by_name(family, tmp_path):
    meswitch.compress(family / "base", family / "math", tmp_path / "delta", bits="exact")
    stream = UP.removesuffix("weight") + "weight_exact"

    def flip(tensors):
        tensors[stream][50] ^= 1

    rewritten(tmp_path / "delta", flip)
    Artifact.open(tmp_path / "delta").verify()
    with pytest.raises(ArtifactError, match=rf"delta: {UP}: block 0 is"):
        merge(family / "base", tmp_path / "delta", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    file = tmp_path / "delta" / "delta.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum differs"):
        Artifact.open(tmp_path / "delta").verify()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"target_bpw": 3.0}, "target_bpw"),
        ({"salient": 2}, "salient"),
        ({"group_size": None}, "group_size"),
        ({"calibration": "text.txt"}, "calibration"),
        ({"calibration_tokens": 100}, "calibration_tokens"),
        ({"distill": 5}, "distill"),
        ({"distill": 0}, "distill"),
        ({"distill_scope": "block"}, "distill_scope"),
        ({"embeddings": "exact"}, "embeddings"),
        ({"method": "svd"}, "method"),
        ({"parameters": {"seed": 1}}, "parameters"),
        ({"solver": Solver(feedback=False)}, "solver"),
    ],
)
def test_options_of_rounding_are_refused_by_name(options, field):
    with pytest.raises(ConfigError, match=f"^{field}: bits: exact: nothing is rounded"):
        Options(bits="exact", **options)

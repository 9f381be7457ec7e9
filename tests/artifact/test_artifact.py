"""The format on disk: what is written is what is read, and nothing else is ever read."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from meswitch import Artifact
from meswitch.artifact import ArtifactWriter, Entry, Manifest, Method, account, fingerprint
from meswitch.artifact.manifest import BaseInfo, ExpertInfo, Provenance
from meswitch.artifact.writer import companion_digests
from meswitch.checkpoint import Checkpoint
from meswitch.codec import PackedDelta, Spec, encode
from meswitch.errors import ArtifactError, IncompatibleError


@pytest.fixture
def artifact(math_delta, tmp_path):
    """A copy to damage."""
    shutil.copytree(math_delta, tmp_path / "math")
    return tmp_path / "math"


def edit_manifest(directory, change):
    file = directory / "meswitch.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@given(
    bits=st.sampled_from([1, 2, 3, 4]),
    rows=st.integers(1, 12),
    width=st.integers(1, 90),
    group=st.sampled_from([None, 8, 64]),
    salient=st.integers(0, 3),
    extra=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_delta_comes_back_bit_for_bit(tmp_path_factory, bits, rows, width, group, salient, extra, seed):
    root = tmp_path_factory.mktemp("round-trip")
    generator = torch.Generator().manual_seed(seed)
    added = torch.randn(extra, width, generator=generator).bfloat16() if extra else None
    spec = Spec(bits=bits, group_size=group, salient=salient)
    delta = encode(torch.randn(rows, width, generator=generator), spec, name="a.weight", extra=added)
    norm = torch.randn(width, generator=generator)
    writer = ArtifactWriter(root / "out", "plan")
    shape = (rows + extra, width)
    writer.add("a.weight", Entry("packed", "linear", shape, {}, None, bits, group), delta.tensors())
    writer.add("n.weight", Entry("dense", "norm", (width,), {}, None), {"": norm})
    (root / "config.json").write_text("{}")
    companions = [root / "config.json"]
    manifest = Manifest(
        base=BaseInfo("base", "sampled-sha256:0", "mistral", 8),
        expert=ExpertInfo("expert", rows * width, 2 * rows * width, "BF16", 8, False),
        method=Method("me-switch", bits, group, salient, "quantised", 0.01),
        tensors=writer.final_entries(),
        companions=companion_digests(companions),
        provenance=Provenance("0", "0", "0", "2026-01-01T00:00:00+00:00"),
    )
    writer.finish(manifest, companions)
    read = Artifact.open(root / "out")
    assert read.manifest == manifest
    back = read.read("a.weight")
    assert isinstance(back, PackedDelta)
    assert torch.equal(back.dequantize(), delta.dequantize())
    for suffix, tensor in delta.tensors().items():
        assert torch.equal(back.tensors()[suffix], tensor), suffix
    assert torch.equal(read.read("n.weight"), norm)


def test_every_byte_is_accounted_for(math_delta):
    artifact = Artifact.open(math_delta)
    accounting = account(artifact)
    assert sum(accounting.by_content.values()) == artifact.nbytes
    assert sum(layer.bytes for layer in accounting.by_layer) == artifact.nbytes
    assert sum(layer.parameters for layer in accounting.by_layer) == artifact.manifest.expert.parameters
    payload = sum(t.nbytes for t in load_file(math_delta / "delta.safetensors").values())
    assert payload == artifact.nbytes
    assert artifact.disk_bytes == sum(path.stat().st_size for path in math_delta.iterdir())
    assert artifact.bits_per_weight == payload * 8 / 2_000_512


def test_stored_names_follow_compressed_tensors(math_delta):
    names = load_file(math_delta / "delta.safetensors")
    assert {n for n in names if n.startswith("model.layers.0.mlp.up_proj")} == {
        f"model.layers.0.mlp.up_proj.{suffix}"
        for suffix in ("weight_packed", "weight_scale", "weight_shape", "salient_index", "salient_weight")
    }
    assert names["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    assert names["model.layers.0.mlp.up_proj.weight_shape"].tolist() == [512, 128]
    assert "model.norm.weight" in names


def test_a_flipped_bit_is_found_wherever_it_is(artifact):
    file = artifact / "delta.safetensors"
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for position in range(header, len(good), (len(good) - header) // 7):
        data = bytearray(good)
        data[position] ^= 4
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"delta\.safetensors: .*checksum differs"):
            Artifact.open(artifact).verify()


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.001, 0])
def test_a_truncated_file_is_refused_before_anything_is_read(artifact, keep):
    file = artifact / "delta.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ArtifactError, match=r"delta\.safetensors: .*(truncated|not a safetensors file|is empty)"):
        Artifact.open(artifact)


def test_a_missing_weight_file_is_named(artifact):
    (artifact / "delta.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"delta\.safetensors: missing; copy the artifact again"):
        Artifact.open(artifact)


def test_a_missing_tokenizer_is_named(artifact):
    (artifact / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: missing; copy the artifact again"):
        Artifact.open(artifact)


def test_a_changed_tokenizer_is_found(artifact):
    (artifact / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja: differs from the manifest's checksum"):
        Artifact.open(artifact).verify()


def test_an_exchanged_tensor_is_refused(artifact):
    tensors = load_file(artifact / "delta.safetensors")
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.bfloat16)
    save_file(tensors, artifact / "delta.safetensors")
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight is BF16 \[64\], the manifest says BF16 \[128\]"):
        Artifact.open(artifact)


def test_a_tensor_that_the_manifest_does_not_know_is_refused(artifact):
    tensors = load_file(artifact / "delta.safetensors")
    save_file(tensors | {"surprise": torch.zeros(3)}, artifact / "delta.safetensors")
    with pytest.raises(ArtifactError, match="surprise is not in the manifest"):
        Artifact.open(artifact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "format: not a meswitch artifact"),
        (lambda d: d.update(version=99), "version: 99 is newer than this meswitch reads"),
        (lambda d: d.update(version="1"), "version: '1' is not a version number"),
        (lambda d: d.update(extra=1), "extra: unknown field"),
        (lambda d: d["method"].update(trick=True), r"method\.trick: unknown field"),
        (lambda d: d["base"].pop("fingerprint"), r"base\.fingerprint: missing field"),
        (lambda d: d["expert"].update(parameters="many"), r"expert\.parameters: expected int, found 'many'"),
        (lambda d: d["tensors"]["model.norm.weight"].update(kind="odd"), r"tensors\.model\.norm\.weight\.kind"),
        (lambda d: d["tensors"]["lm_head.weight"].update(bits=9), r"tensors\.lm_head\.weight\.bits"),
        (lambda d: d["tensors"]["lm_head.weight"].update(bits=4), r"tensors\.lm_head\.weight\.stored: shapes"),
        (lambda d: d.update(tensors={}), "tensors: empty"),
        (lambda d: d["tensors"]["lm_head.weight"].update(shape=[2048, 64]), r"tensors\.lm_head\.weight\.stored"),
        (
            lambda d: d["tensors"]["model.norm.weight"]["stored"][""].update(file="../delta.safetensors"),
            "must be a file name in the artifact",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_by_field(artifact, change, message):
    edit_manifest(artifact, change)
    with pytest.raises(ArtifactError, match=rf"meswitch\.json: .*{message}|{message}"):
        Artifact.open(artifact)


def test_a_manifest_that_is_not_json_is_refused(artifact):
    (artifact / "meswitch.json").write_text('{"format": ')
    with pytest.raises(ArtifactError, match=r"meswitch\.json: not valid JSON"):
        Artifact.open(artifact)


def test_a_salient_channel_out_of_range_is_never_handed_out(artifact):
    tensors = load_file(artifact / "delta.safetensors")
    name = "model.layers.0.mlp.up_proj.salient_index"
    tensors[name] = torch.full_like(tensors[name], 4096)
    save_file(tensors, artifact / "delta.safetensors")
    import hashlib

    digest = hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()
    entry = "model.layers.0.mlp.up_proj.weight"
    edit_manifest(artifact, lambda d: d["tensors"][entry]["stored"]["salient_index"].update(sha256=digest))
    with pytest.raises(ArtifactError, match="salient_index: not ascending within 128 input channels"):
        Artifact.open(artifact).read(entry)


def test_a_full_checkpoint_is_told_from_an_artifact(family):
    with pytest.raises(ArtifactError, match="this is a full checkpoint, compress it first"):
        Artifact.open(family / "math")


def test_the_right_base_is_accepted_from_any_path_and_any_sharding(family, math_delta, tmp_path):
    from transformers import AutoModelForCausalLM

    elsewhere = tmp_path / "elsewhere"
    AutoModelForCausalLM.from_pretrained(family / "base").save_pretrained(elsewhere, max_shard_size="500KB")
    assert (elsewhere / "model.safetensors.index.json").is_file()
    Artifact.open(math_delta).check_base(Checkpoint.open(elsewhere), full=True)


def test_another_base_is_refused_by_content(family, math_delta):
    other = Checkpoint.open(family / "code")
    with pytest.raises(IncompatibleError, match=r"its fingerprint .* is not the"):
        Artifact.open(math_delta).check_base(other)
    with pytest.raises(IncompatibleError, match=r"lm_head\.weight is not the tensor .* called 'base', or"):
        Artifact.open(math_delta).check_base(other, full=True)


def test_the_fingerprint_depends_on_every_small_tensor(family, tmp_path):
    shutil.copytree(family / "base", tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint(Checkpoint.open(tmp_path / "base")) != fingerprint(Checkpoint.open(family / "base"))

"""Every method through the whole pipeline: compress, verify, inspect, merge; and what refuses it."""

import json
import math
import zlib

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import meswitch
from meswitch import Artifact
from meswitch.artifact import account
from meswitch.checkpoint import Checkpoint
from meswitch.cli.artifacts import artifact_report
from meswitch.codec import CodedDelta, PackedDelta, encode_coded, find_codec
from meswitch.compression.merge import load_merged, merge, merged_tensors
from meswitch.errors import ArtifactError, ConfigError, IncompatibleError
from meswitch.slots import ExpertStore
from meswitch_lab import CODED, METHODS
from meswitch_lab import options as lab_options

UP = "model.layers.0.mlp.up_proj.weight"
ALL = ("me-switch", *METHODS)


@pytest.fixture
def calibration(tmp_path):
    (tmp_path / "text.txt").write_text("How many apples does Tom have now?\nWrite a function f(xs).\n" * 8)
    return tmp_path / "text.txt"


@pytest.fixture(scope="module")
def made(family, tmp_path_factory):
    """The math expert by every method, with the method's own defaults."""
    root = tmp_path_factory.mktemp("methods")
    return {m: meswitch.compress(family / "base", family / "math", root / m, chosen(m)) for m in ALL}


def chosen(method):
    """Options under which what is made of a matrix does not depend on the other matrices."""
    return lab_options(method, **({"step": 0.0} if method == "ultradelta" else {}))


def restored(base, artifact):
    return dict(merged_tensors(Checkpoint.open(base), Artifact.open(artifact), torch.float32))


@pytest.mark.parametrize("method", CODED)
def test_a_coded_tensor_comes_back_bit_for_bit(made, family, method):
    artifact = Artifact.open(made[method].directory)
    artifact.verify()
    back = artifact.read(UP)
    assert isinstance(back, CodedDelta)
    base, expert = Checkpoint.open(family / "base"), Checkpoint.open(family / "math")
    delta = expert.read(UP).float() - base.read(UP).float()
    request = chosen(method).request("linear", *delta.shape, zlib.crc32(UP.encode()))
    coded = encode_coded(method, delta, request, name=UP)
    assert dict(back.meta) == coded.meta
    for suffix, tensor in coded.tensors().items():
        assert torch.equal(back.tensors()[suffix], tensor), suffix
    assert torch.equal(back.dequantize(), coded.dequantize())


@pytest.mark.parametrize("method", ALL)
def test_every_byte_is_accounted_for(made, method):
    artifact = made[method]
    accounting = account(artifact)
    assert sum(accounting.by_content.values()) == artifact.nbytes
    assert sum(layer.bytes for layer in accounting.by_layer) == artifact.nbytes
    assert sum(t.nbytes for t in load_file(artifact.directory / "delta.safetensors").values()) == artifact.nbytes
    assert artifact_report(artifact)["bytes"]["total"] == artifact.disk_bytes


@pytest.mark.parametrize("method", ALL)
def test_kinds_are_those_of_the_method(made, method):
    manifest = made[method].manifest
    assert manifest.method.name == method
    kinds = {entry.role: entry.kind for entry in manifest.tensors.values()}
    matrices = "coded" if method in CODED else "packed"
    whole = method in CODED and find_codec(method).blocks_only
    assert kinds["linear"] == matrices
    assert kinds["embedding"] == kinds["head"] == ("dense" if whole else matrices)
    assert manifest.method.embeddings == ("exact" if whole else "quantised")
    assert kinds["norm"] == "dense"


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("case", [{"added_tokens": 2}, {"tied": True}], ids=["added", "tied"])
def test_a_merged_expert_loads_and_is_nearer_to_the_expert(pair, tmp_path, method, case):
    base, expert = pair(**case)
    parameters = {"drop": 0.1} if method == "dare" else {}
    options = lab_options(method, bits=4, embeddings="quantised", **parameters)
    meswitch.compress(base, expert, tmp_path / "delta", options)
    model = AutoModelForCausalLM.from_pretrained(merge(base, tmp_path / "delta", tmp_path / "merged"))
    assert model.get_input_embeddings().weight.shape[0] == 2048 + case.get("added_tokens", 0)
    ours, theirs = Checkpoint.open(base).read(UP).float(), Checkpoint.open(expert).read(UP).float()
    found = restored(base, tmp_path / "delta")
    assert (found[UP] - theirs).norm() < (ours - theirs).norm()
    embedding = found["model.embed_tokens.weight"]
    wanted = Checkpoint.open(expert).read("model.embed_tokens.weight").float()
    assert torch.equal(embedding[2048:], wanted[2048:])
    loaded = load_merged(base, tmp_path / "delta", torch.bfloat16)
    assert torch.equal(loaded.state_dict()[UP], model.state_dict()[UP].to(torch.bfloat16))


@pytest.mark.parametrize("method", [name for name in CODED if find_codec(name).uses_inputs])
def test_calibration_changes_what_is_stored(pair, tmp_path, calibration, method):
    base, expert = pair()
    blind = meswitch.compress(base, expert, tmp_path / "blind", method=method)
    seeing = meswitch.compress(base, expert, tmp_path / "seeing", method=method, calibration=calibration)
    assert not torch.equal(blind.read(UP).dequantize(), seeing.read(UP).dequantize())
    assert seeing.manifest.method.calibration.source == "text.txt"
    assert seeing.manifest.method.distillation is None


@pytest.mark.parametrize("method", METHODS)
def test_text_that_would_not_be_used_is_refused(pair, tmp_path, calibration, method):
    base, expert = pair()
    if method in CODED and find_codec(method).uses_inputs:
        pytest.skip("it uses calibration text")
    with pytest.raises(ConfigError, match=f"calibration: the method {method} makes no use of it"):
        meswitch.compress(base, expert, tmp_path / "delta", method=method, calibration=calibration)


@pytest.mark.parametrize("method", [name for name in CODED if not find_codec(name).is_trainable])
def test_a_method_without_scales_is_not_distilled(pair, tmp_path, calibration, method):
    base, expert = pair()
    with pytest.raises(ConfigError, match=f"distill: the method {method} has no scales to train"):
        meswitch.compress(base, expert, tmp_path / "delta", method=method, calibration=calibration, distill=10)
    assert not list(tmp_path.glob("delta*"))


def test_rtn_ignores_inputs_and_can_be_distilled(family, tmp_path):
    text = family / "calibration/math.jsonl"
    made = meswitch.compress(
        family / "base", family / "math", tmp_path / "delta", method="rtn", calibration=text, distill=1,
        calibration_tokens=1500,
    )  # fmt: skip
    assert made.manifest.method.name == "rtn"
    assert made.manifest.method.distillation.steps == 1
    plain = meswitch.compress(family / "base", family / "math", tmp_path / "plain", method="rtn")
    ours, theirs = made.read(UP), plain.read(UP)
    assert isinstance(ours, PackedDelta)
    assert torch.equal(ours.packed, theirs.packed)
    assert not ours.salient_index.numel()


def test_rtn_can_be_served(made):
    store = ExpertStore({"math": made["rtn"]}, slots=1, device=torch.device("cpu"))
    held = store.tensors(store.acquire("math"))[UP]
    assert torch.equal(held.dequantize(), made["rtn"].read(UP).dequantize())


@pytest.mark.parametrize("method", CODED)
def test_a_baseline_is_not_served(made, family, method):
    message = f"{method} is a baseline for comparison: it can be merged and evaluated, not served"
    with pytest.raises(IncompatibleError, match=message):
        ExpertStore({"math": made[method]}, slots=1, device=torch.device("cpu"))


def test_the_engine_refuses_a_baseline(made, family):
    with pytest.raises(IncompatibleError, match="bitdelta is a baseline for comparison"):
        meswitch.Engine(family / "base", {"math": made["bitdelta"].directory})


def test_the_same_seed_drops_the_same_weights(made, family, tmp_path):
    again = meswitch.compress(family / "base", family / "math", tmp_path / "again", method="dare")
    first, second = (a.read(UP).tensors() for a in (made["dare"], again))
    assert all(torch.equal(first[suffix], second[suffix]) for suffix in first)
    other = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(first["mask_packed"], again.read(other).tensors()["mask_packed"])
    assert again.manifest.method.parameters == {"drop": 0.9, "seed": 0}


def test_svd_takes_the_rank_it_is_given(pair, tmp_path):
    made = meswitch.compress(*pair(), tmp_path / "delta", method="svd", parameters={"rank": 3})
    assert made.read(UP).tensors()["factor_left"].shape == (160, 3)
    assert made.manifest.method.parameters == {"rank": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gzip"}, "method: 'gzip' is none of me-switch.*rtn.*install the package"),
        ({"parameters": {"rank": 3}}, "rank: the method me-switch has no such parameter; it has none"),
        ({"method": "svd", "parameters": {"rank": 0}}, "rank: 0: at least 1, whole"),
        ({"method": "svd", "parameters": {"rank": 1.5}}, "rank: 1.5: at least 1, whole"),
        (
            {"method": "dare", "parameters": {"rank": 3}},
            "rank: the method dare has no such parameter; it has drop, seed",
        ),
        ({"method": "dare", "parameters": {"drop": 1.0}}, "drop: 1: at least 0, less than 1"),
        ({"method": "deltazip", "group_size": 9}, "group_size: 9: .* even"),
    ],
)
def test_options_that_do_not_fit_are_refused(family, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", **options)


def test_a_damaged_expert_is_refused_by_name(pair, tmp_path):
    base, expert = pair()
    file = expert / "model.safetensors"
    tensors = load_file(file)
    tensors[UP][0, 0] = math.inf
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(meswitch.MeswitchError, match=f"{UP}: has NaN or infinite values"):
        meswitch.compress(base, expert, tmp_path / "delta", method="bitdelta")


def edit(artifact, change):
    file = artifact / "meswitch.json"
    data = json.loads(file.read_text())
    change(data["tensors"])
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[UP].update(method="gzip"), rf"{UP}.method: 'gzip' is none of"),
        (lambda t: t[UP].pop("method"), rf"{UP}.method: None is none of"),
        (lambda t: t[UP].pop("meta"), rf"{UP}.meta.rank: missing field"),
        (lambda t: t[UP]["meta"].update(depth=1), rf"{UP}.meta.depth: unknown field"),
        (lambda t: t[UP]["meta"].update(rank=0.5), rf"{UP}.meta.rank: expected int"),
        (lambda t: t[UP]["meta"].update(rank=1), rf"{UP}.stored: shapes"),
        (lambda t: t[UP]["meta"].update(rank=999), rf"{UP}.rank: 999"),
        (lambda t: t[UP]["stored"]["factor_left"].update(dtype="F16"), rf"{UP}.stored.factor_left.dtype: F16"),
        (lambda t: t[UP].update(bits=2), rf"{UP}.bits: not a field of a coded tensor"),
        (lambda t: t["model.norm.weight"].update(method="svd"), "model.norm.weight.method: not a field of a dense"),
        (lambda t: t["model.norm.weight"].update(meta={}), "model.norm.weight.meta: not a field of a dense"),
    ],
)
def test_a_manifest_is_read_strictly(pair, tmp_path, change, message):
    made = meswitch.compress(*pair(), tmp_path / "delta", method="svd")
    edit(made.directory, change)
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(made.directory)


def test_an_interrupted_run_goes_on(pair, tmp_path, monkeypatch):
    from meswitch.artifact import ArtifactWriter

    base, expert = pair()
    whole = meswitch.compress(base, expert, tmp_path / "whole", method="per-axis")
    add, count = ArtifactWriter.add, [0]

    def stops(self, *args, **options):
        count[0] += 1
        if count[0] == 9:
            raise KeyboardInterrupt
        add(self, *args, **options)
        self.keep()

    with monkeypatch.context() as patched:
        patched.setattr(ArtifactWriter, "add", stops)
        with pytest.raises(KeyboardInterrupt):
            meswitch.compress(base, expert, tmp_path / "delta", method="per-axis")
    again = meswitch.compress(base, expert, tmp_path / "delta", method="per-axis")
    assert {n: e.meta for n, e in again.manifest.tensors.items()} == {
        n: e.meta for n, e in whole.manifest.tensors.items()
    }
    assert torch.equal(again.read(UP).dequantize(), whole.read(UP).dequantize())

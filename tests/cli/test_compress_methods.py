"""compress --method, --rank and --drop: what they make, what they say, and what they refuse."""

import json

import pytest

from meswitch import Artifact
from meswitch.codec import BASELINES, METHODS

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def compress(cli, family, tmp_path):
    """`compress("--method", "svd")` compresses the math expert and gives the table's row and the artifact."""

    def run(*args):
        pair = ("--base", family / "base", "--expert", family / "math")
        row = cli.json("compress", *pair, "--out", tmp_path / "delta", *args)
        return row, Artifact.open(tmp_path / "delta")

    return run


@pytest.fixture
def text(family, tmp_path):
    """12 conversations of the math domain: enough to train on, too few to be trained on by default."""
    lines = (family / "calibration" / "math.jsonl").read_text().splitlines()[:12]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path / "text.jsonl"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_compresses_verifies_and_inspects(compress, cli, family, tmp_path, method):
    row, artifact = compress("--method", method)
    assert artifact.manifest.method.name == method
    assert artifact.manifest.method.distillation is None
    assert row["tensor_bytes"] == artifact.nbytes
    cli.ok("verify", artifact.directory, "--base", family / "base")
    assert cli.json("inspect", artifact.directory)["method"]["name"] == method
    cli.ok("merge", "--base", family / "base", "--delta", artifact.directory, "--out", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_default_method_is_me_switch(compress):
    _, artifact = compress()
    assert artifact.manifest.method.name == "me-switch"


def test_rank_decides_the_factors_of_svd(compress):
    _, artifact = compress("--method", "svd", "--rank", 5)
    assert artifact.manifest.tensors[UP].meta == {"rank": 5}
    assert artifact.manifest.method.parameters == {"rank": 5}
    assert artifact.read(UP).tensors()["factor_left"].shape[1] == 5


def test_drop_decides_how_many_weights_dare_keeps(compress):
    _, artifact = compress("--method", "dare", "--drop", 0.75)
    entry = artifact.manifest.tensors[UP]
    assert entry.meta["keep"] == entry.shape[1] // 4
    assert artifact.manifest.method.parameters == {"drop": 0.75, "seed": 0}


@pytest.mark.parametrize("method", [name for name in BASELINES if BASELINES[name].scale is not None])
def test_steps_distil_methods_with_scales_by_their_own_recipe(compress, cli, text, method):
    _, artifact = compress("--method", method, "--calibration", text, "--distill", 2)
    info = artifact.manifest.method.distillation
    assert (info.steps, info.learning_rate) == (2, {"bitdelta": 1e-4, "per-axis": 1e-5}[method])
    shown = json.loads((artifact.directory / "meswitch.json").read_text())["method"]["distillation"]
    assert shown["held_out_after"] <= shown["held_out_before"]
    assert cli.ok("inspect", artifact.directory).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method gzip", "method: 'gzip' is none of me-switch, rtn, bitdelta, svd"),
        ("--rank 4", "rank: 4: at least 1, and for the method svd only"),
        ("--method dare --rank 4", "rank: 4: at least 1, and for the method svd only"),
        ("--drop 0.5", "drop: 0.5: at least 0 and less than 1, and for the method dare only"),
        ("--method dare --drop 1", "drop: 1.0: at least 0 and less than 1"),
        ("--method deltazip --group-size 9", "group_size: 9: two weights of four share a scale: give an even number"),
        ("--method svd --calibration {text}", "calibration: the method svd makes no use of it; leave it out"),
        (
            "--method bitdelta --calibration {text} --distill 0",
            "calibration: the method bitdelta makes no use of it without distillation; leave it out",
        ),
        ("--method bitdelta --distill 5", "distill: needs calibration text to train on; give a calibration file"),
        ("--method dare --calibration {text} --distill 5", "distill: the method dare has no scales to train"),
    ],
)
def test_what_does_not_fit_the_method_is_refused(cli, family, tmp_path, text, options, message):
    pair = ("--base", family / "base", "--expert", family / "math", "--out", tmp_path / "delta")
    assert message in cli.error("compress", *pair, *options.format(text=text).split())
    assert not list(tmp_path.glob("delta*"))


@pytest.mark.parametrize("option", [("--method", "svd"), ("--rank", 4), ("--drop", 0.5)], ids=lambda o: o[0])
def test_a_family_is_compressed_by_the_default_method(cli, new_family, option):
    message = f"{option[0]}: a family is served, by the default method; compress a single --expert"
    assert message in cli.error("compress", "--family", new_family("math"), *option)


def test_a_rank_below_one_and_a_share_above_one_are_no_options(cli, family, tmp_path):
    pair = ("--base", family / "base", "--expert", family / "math", "--out", tmp_path / "delta")
    for wrong in (("--method", "svd", "--rank", 0), ("--method", "dare", "--drop", 1.5)):
        result = cli("compress", *pair, *wrong)
        assert result.exit_code == 2
        assert wrong[2] in result.stderr


@pytest.mark.parametrize("method", ["bitdelta", "svd"])
def test_an_artifact_of_a_baseline_is_not_served(compress, cli, family, tmp_path, method):
    _, artifact = compress("--method", method)
    (tmp_path / "family.toml").write_text(
        f'[base]\npath = "{family}/base"\n[[expert]]\nname = "math"\ndelta = "{artifact.directory}"\n'
        'description = "sums"\n'
    )
    error = cli.error("generate", "--family", tmp_path / "family.toml", "--model", "math", "hello")
    assert f"{method} is a baseline for comparison: it can be merged and evaluated, not served" in error

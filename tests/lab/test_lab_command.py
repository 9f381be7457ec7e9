"""python -m meswitch_lab: what it makes, what it says, and what it refuses."""

import json

import pytest
from typer.testing import CliRunner

from meswitch import Artifact
from meswitch_lab import METHODS
from meswitch_lab.__main__ import app

UP = "model.layers.0.mlp.up_proj.weight"


def lab(*args):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(arg) for arg in args])


@pytest.fixture
def compress(family, tmp_path):
    """`compress("--method", "svd")` compresses the math expert and gives the table's row and the artifact."""

    def run(*args):
        pair = ("--base", family / "base", "--expert", family / "math")
        result = lab("compress", *pair, "--out", tmp_path / "delta", "--json", *args)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout), Artifact.open(tmp_path / "delta")

    return run


@pytest.fixture
def text(family, tmp_path):
    """12 conversations of the math domain: enough to train on, too few to be trained on by default."""
    lines = (family / "calibration" / "math.jsonl").read_text().splitlines()[:12]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path / "text.jsonl"


@pytest.mark.parametrize("method", ["me-switch", *METHODS])
def test_every_method_compresses_and_the_products_commands_read_it(compress, cli, family, tmp_path, method):
    row, artifact = compress("--method", method)
    assert artifact.manifest.method.name == method
    assert artifact.manifest.method.distillation is None
    assert row["tensor_bytes"] == artifact.nbytes
    cli.ok("verify", artifact.directory, "--base", family / "base")
    assert cli.json("inspect", artifact.directory)["method"]["name"] == method
    cli.ok("merge", "--base", family / "base", "--delta", artifact.directory, "--out", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_rank_decides_the_factors_of_svd(compress):
    _, artifact = compress("--method", "svd", "-p", "rank=5")
    assert artifact.manifest.tensors[UP].meta == {"rank": 5}
    assert artifact.manifest.method.parameters == {"rank": 5}
    assert artifact.read(UP).tensors()["factor_left"].shape[1] == 5


def test_drop_decides_how_many_weights_dare_keeps(compress):
    _, artifact = compress("--method", "dare", "--parameter", "drop=0.75")
    entry = artifact.manifest.tensors[UP]
    assert entry.meta["keep"] == entry.shape[1] // 4
    assert artifact.manifest.method.parameters == {"drop": 0.75, "seed": 0}


def test_the_solvers_switches_are_recorded(compress):
    _, artifact = compress("--no-feedback", "--scales", "normal", "--damping", 0.1)
    method = artifact.manifest.method
    assert (method.solver.feedback, method.solver.refit, method.solver.scales) == (False, True, "normal")
    assert (method.solver.salient_rule, method.damping) == ("error", 0.1)


@pytest.mark.parametrize("method", ["bitdelta", "per-axis"])
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
        ("--method gzip", "method: 'gzip' is none of me-switch"),
        ("-p rank=4", "rank: the method me-switch has no such parameter"),
        ("--method dare -p rank=4", "rank: the method dare has no such parameter; it has drop, seed"),
        ("--method dare -p drop=1", "drop: 1: at least 0, less than 1"),
        ("--method dare -p drop", "--parameter: 'drop' is not NAME=NUMBER"),
        ("--method deltazip --group-size 9", "group_size: 9: two weights of four share a scale: give an even number"),
        ("--method svd --calibration {text}", "calibration: the method svd makes no use of it; leave it out"),
        (
            "--method bitdelta --calibration {text} --distill 0",
            "calibration: the method bitdelta makes no use of it without distillation; leave it out",
        ),
        ("--method bitdelta --distill 5", "distill: needs calibration text to train on; give a calibration file"),
        ("--method dare --calibration {text} --distill 5", "distill: the method dare has no scales to train"),
        ("--bits exact --no-refit", "refit: bits: exact: nothing is rounded, chosen or trained; leave refit out"),
    ],
)
def test_what_does_not_fit_the_method_is_refused(family, tmp_path, text, options, message):
    pair = ("--base", family / "base", "--expert", family / "math", "--out", tmp_path / "delta")
    result = lab("compress", *pair, *options.format(text=text).split())
    assert result.exit_code == 1
    assert message in result.stderr
    assert not list(tmp_path.glob("delta*"))


def test_the_methods_are_listed_with_their_parameters():
    listed = lab("methods").stdout
    assert listed.splitlines()[0] == "me-switch"
    assert all(f"\n{method}\n" in listed for method in METHODS)
    assert "-p drop=…  Share of weights that is set to zero. Default: 0.9." in listed


@pytest.mark.parametrize("method", ["bitdelta", "svd"])
def test_an_artifact_of_another_method_is_not_served(compress, cli, family, tmp_path, method):
    _, artifact = compress("--method", method)
    (tmp_path / "family.toml").write_text(
        f'[base]\npath = "{family}/base"\n[[expert]]\nname = "math"\ndelta = "{artifact.directory}"\n'
        'description = "sums"\n'
    )
    error = cli.error("generate", "--family", tmp_path / "family.toml", "--model", "math", "hello")
    assert f"{method} is a baseline for comparison: it can be merged and evaluated, not served" in error

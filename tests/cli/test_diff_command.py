"""diff: what the math fine-tune changed."""

import sys

import pytest

from meswitch.checkpoint import Checkpoint


@pytest.fixture
def pair_of(family):
    return ("--base", family / "base", "--expert", family / "math")


def test_diff_agrees_with_a_plain_computation(cli, family, pair_of):
    found = cli.json("diff", *pair_of)
    base, expert = Checkpoint.open(family / "base"), Checkpoint.open(family / "math")
    name = "model.layers.2.self_attn.o_proj.weight"
    ours, theirs = base.read(name).double(), expert.read(name).double()
    item = next(item for item in found["tensors"] if item["name"] == name)
    delta = theirs - ours
    assert item["relative_norm"] == pytest.approx(float(delta.norm() / ours.norm()))
    assert item["largest"] == float(delta.abs().max())
    assert item["unchanged"] == int((delta == 0).sum())
    assert (item["layer"], item["type"]) == (2, "self_attn.o_proj")
    assert found["total"]["weights"] == expert.parameters
    assert found["obstacle"] is None
    assert found["tokenizer"]["added"] == []


def test_the_table_shows_layers_types_and_what_is_the_same(cli, pair_of):
    text = cli.ok("diff", *pair_of).stdout
    for words in ("self_attn.q_proj", "change by layer", "lm_head", "the same tokens", "can share the base"):
        assert words in text
    layers = text.split("change by layer")[1].splitlines()
    assert [line.split()[0] for line in layers if line[:2].strip().isdigit()] == ["0", "1", "2", "3", "4", "5"]


def test_the_plot_is_a_png(cli, pair_of, tmp_path):
    result = cli.ok("diff", *pair_of, "--png", tmp_path / "plots" / "math.png")
    assert (tmp_path / "plots/math.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {tmp_path}/plots/math.png" in result.stderr


def test_without_matplotlib_the_extra_is_named(cli, pair_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'meswitch[plot]'" in cli.error("diff", *pair_of, "--png", tmp_path / "x.png")

"""Experts that moved far from their base."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import meswitch
from meswitch.checkpoint import Checkpoint
from meswitch.compression.large_delta import LargeDeltas, relative_norm
from meswitch.compression.merge import load_merged

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def moved(pair):
    """A pair whose expert has large noise in one matrix."""
    base, expert = pair()
    model = AutoModelForCausalLM.from_pretrained(expert)
    torch.manual_seed(1)
    with torch.no_grad():
        weight = model.get_parameter(LAYER)
        weight.add_((torch.randn(weight.shape) * weight.float().std() * 2).to(weight.dtype))
    model.save_pretrained(expert)
    return base, expert


def compressed(base, expert, out, **options):
    lines = []
    artifact = meswitch.compress(base, expert, out, notice=lines.append, **options)
    return artifact, lines


def test_the_relative_norm_is_that_of_the_delta_over_the_base():
    assert relative_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])) == pytest.approx(0.5)
    assert relative_norm(torch.ones(2, 2), torch.zeros(2, 2)) == float("inf")
    assert relative_norm(torch.zeros(2, 2), torch.zeros(2, 2)) == 0


def test_a_layer_that_moved_far_is_named_and_the_others_are_not(moved, tmp_path):
    _, lines = compressed(*moved, tmp_path / "delta")
    (line,) = lines
    assert line.startswith("large deltas: 1 of 16 matrices moved by 0.3 of their norm or more: model.layers.1.mlp.up")
    assert "up_proj (2.0" in line
    assert "more bits keep them closer" in line


def test_a_small_fine_tune_needs_no_warning(pair, tmp_path):
    _, lines = compressed(*pair(), tmp_path / "delta")
    assert lines == []


def test_many_large_deltas_make_one_short_line():
    seen = LargeDeltas({f"model.layers.{i}.mlp.up_proj.weight": 0.3 + i / 100 for i in range(40)} | {"small": 0.29})
    line = seen.warning(bits=4)
    assert line.startswith("large deltas: 40 of 41 matrices")
    assert "model.layers.39.mlp.up_proj (0.69), model.layers.38.mlp.up_proj (0.68), model.layers.37" in line
    assert " and 37 more; they lose most" in line
    assert len(line) < 300


@pytest.mark.parametrize("bits", [2, 4])
def test_a_large_delta_is_rounded_as_well_as_a_small_one(moved, tmp_path, bits):
    """The error stays in proportion to the delta, so that more bits do help, and the artifact works."""
    base, expert = moved
    artifact, _ = compressed(base, expert, tmp_path / "delta", bits=bits)
    artifact.verify()
    ours, theirs = Checkpoint.open(expert), Checkpoint.open(base)
    model = load_merged(base, tmp_path / "delta")
    share = {}
    for name in (LAYER, "model.layers.0.mlp.up_proj.weight"):
        delta = ours.read(name).float() - theirs.read(name).float()
        error = model.get_parameter(name).detach().float() - ours.read(name).float()
        share[name] = (error.norm() / delta.norm()).item()
    assert share[LAYER] < {2: 0.4, 4: 0.13}[bits]
    assert share[LAYER] == pytest.approx(share["model.layers.0.mlp.up_proj.weight"], rel=0.15)
    assert model(torch.tensor([[0, 5, 9]])).logits.isfinite().all()


def test_a_resumed_run_says_the_same(moved, tmp_path):
    class Stop(Exception):
        pass

    def stop(phase, done, total, name):
        if name == LAYER:
            raise Stop

    with pytest.raises(Stop):
        meswitch.compress(*moved, tmp_path / "delta", progress=stop)
    _, lines = compressed(*moved, tmp_path / "delta")
    _, whole = compressed(*moved, tmp_path / "other")
    assert lines == whole
    assert len(lines) == 1


def test_other_methods_warn_too(moved, tmp_path):
    _, lines = compressed(*moved, tmp_path / "delta", method="bitdelta", distill=0)
    assert "up_proj (2.0" in lines[0]

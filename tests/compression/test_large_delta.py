"""Experts that moved far from their base."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import meswitch
from meswitch.checkpoint import Checkpoint
from meswitch.compression.compatibility import LargeDeltas, check_same_base, matched, relative_norm
from meswitch.compression.merge import load_merged
from meswitch.errors import IncompatibleError
from meswitch.tensorfile import TensorInfo
from tests.support.models import make_pair

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


@pytest.fixture
def unrelated(pair, tmp_path):
    """A base, and a model of its shape that was trained apart."""
    base, _ = pair()
    _, other = make_pair(tmp_path / "apart", base, "mistral", seed=7)
    return base, other


def test_a_fine_tune_of_another_base_is_refused_before_any_work(unrelated, tmp_path):
    steps = []
    with pytest.raises(IncompatibleError) as raised:
        meswitch.compress(*unrelated, tmp_path / "delta", progress=lambda *step: steps.append(step))
    line = str(raised.value)
    assert line.startswith(
        f"{unrelated[1]}: is no fine-tune of this base: all 16 matrices that were compared moved by 1."
    )
    assert line.endswith("give the base that it was trained from, or --force (force=True) to go on")
    assert steps == []
    assert not (tmp_path / "delta").exists()


def test_force_goes_on(unrelated, tmp_path):
    artifact, lines = compressed(*unrelated, tmp_path / "delta", force=True)
    artifact.verify()
    assert lines[0].startswith("large deltas: 16 of 16")


def test_one_matrix_that_is_near_tells_the_right_base(unrelated, tmp_path):
    base, other = unrelated
    ours, theirs = (load_file(side / "model.safetensors") for side in unrelated)
    theirs["model.layers.1.mlp.down_proj.weight"] = ours["model.layers.1.mlp.down_proj.weight"]
    save_file(theirs, other / "model.safetensors", metadata={"format": "pt"})
    meswitch.compress(base, other, tmp_path / "delta")


def test_few_rows_of_few_matrices_are_read(unrelated, monkeypatch):
    base, expert = matched(*(Checkpoint.open(side) for side in unrelated))
    counts = []
    read_bytes = TensorInfo.read_bytes

    def counted(info, start=0, count=None):
        data = read_bytes(info, start, count)
        counts.append(len(data))
        return data

    monkeypatch.setattr(TensorInfo, "read_bytes", counted)
    with pytest.raises(IncompatibleError):
        check_same_base(base, expert)
    assert sum(counts) <= 2 * 16 * 64 * 160 * 2  # both sides, matrices, rows, widest, bytes

"""`target_bpw`: one budget for the whole artifact, and how it is shared out over tensors."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import meswitch
from meswitch import Artifact
from meswitch.checkpoint import Checkpoint
from meswitch.codec import Spec
from meswitch.compression.budget import Candidate, allocate, hull, offers
from meswitch.errors import ConfigError
from meswitch.slots.layout import Layout


@pytest.fixture
def text(family):
    return family / "calibration" / "code.jsonl"


def file_bpw(artifact: Artifact) -> float:
    return (artifact.directory / "delta.safetensors").stat().st_size * 8 / artifact.manifest.expert.parameters


@pytest.mark.slow
def test_the_file_keeps_the_budget_and_uses_it(family, tmp_path, text):
    artifact = meswitch.compress(
        family / "base",
        family / "code",
        tmp_path / "delta",
        target_bpw=1.8,
        calibration=text,
        calibration_tokens=1000,
        distill=0,
    )
    assert 1.65 < file_bpw(artifact) <= 1.8
    entries = [e for e in artifact.manifest.tensors.values() if e.kind == "packed"]
    assert len({e.bits for e in entries}) > 1
    assert artifact.manifest.method.target_bpw == 1.8
    assert artifact.manifest.method.bits is None
    artifact.verify()


@pytest.mark.parametrize("target", [1.4, 3.0])
def test_without_text_the_budget_is_kept_too(family, tmp_path, target):
    artifact = meswitch.compress(family / "base", family / "math", tmp_path / "delta", target_bpw=target)
    assert target - 0.2 < file_bpw(artifact) <= target


def test_a_budget_that_cannot_be_kept_names_the_smallest(family, tmp_path):
    with pytest.raises(ConfigError, match=r"target_bpw: 0.3 cannot be reached: the smallest mix takes 0\.\d+ bits"):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", target_bpw=0.3)
    assert not any(tmp_path.iterdir())


def test_an_embedding_becomes_a_pair_of_thin_matrices_where_its_codes_would_take_too_much(family, tmp_path):
    artifact = meswitch.compress(family / "base", family / "math", tmp_path / "delta", target_bpw=0.6)
    entry = artifact.manifest.tensors["model.embed_tokens.weight"]
    assert entry.kind == "lowrank"
    assert 0.45 < file_bpw(artifact) <= 0.6
    assert {4, 8} <= {e.block for e in artifact.manifest.tensors.values() if e.role == "linear"}
    artifact.verify()


def test_no_mix_does_more_harm_than_the_same_bits_everywhere():
    draw = torch.Generator().manual_seed(0)
    deltas = {str(i): torch.randn(64, 96, generator=draw) * (1 + i) for i in range(4)}
    spec = Spec(2, 32, 0)
    found = {name: offers(delta, spec, None, is_table=False, has_salient=False) for name, delta in deltas.items()}
    uniform = {name: next(c for c in ways if c.spec == spec) for name, ways in found.items()}
    specs = allocate(found, sum(c.nbytes for c in uniform.values()))
    chosen = [next(c for c in found[name] if c.spec == way) for name, way in specs.items()]
    assert sum(c.harm for c in chosen) <= sum(c.harm for c in uniform.values())


def test_rows_the_fine_tuning_never_reached_take_no_bytes_on_disk_and_are_whole_in_a_slot(family, tmp_path):
    artifact = meswitch.compress(family / "base", family / "code", tmp_path / "delta")
    entry = artifact.manifest.tensors["model.embed_tokens.weight"]
    live = entry.stored["row_index"].shape[0]
    assert live < 0.7 * entry.shape[0]
    read = artifact.read("model.embed_tokens.weight")
    assert read.packed.shape[0] == entry.shape[0]
    layout = Layout.of(artifact)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.fill(artifact, buffer)
    view = layout.views(buffer)["model.embed_tokens.weight"]
    assert torch.equal(view.dequantize(), read.dequantize())
    assert (read.dequantize() == 0).all(1).sum() == entry.shape[0] - live


def ways(*points: tuple[int, float]) -> list[Candidate]:
    return [Candidate(Spec(bits=1 + i % 4), nbytes, harm) for i, (nbytes, harm) in enumerate(points)]


def test_the_hull_leaves_out_what_pays_less_than_a_mix_of_its_neighbours():
    found = hull(ways((10, 8.0), (20, 7.9), (30, 1.0), (40, 0.9)))
    assert [c.nbytes for c in found] == [10, 30, 40]


def test_bytes_go_where_they_avoid_most_harm():
    offers = {"calm": ways((10, 1.0), (20, 0.9)), "touchy": ways((10, 5.0), (20, 1.0))}
    specs = allocate(offers, 30)
    assert (specs["calm"].bits, specs["touchy"].bits) == (1, 2)


def test_what_does_not_fit_leaves_its_bytes_to_a_smaller_step():
    offers = {"large": ways((10, 9.0), (110, 0.0)), "small": ways((10, 1.0), (20, 0.9))}
    specs = allocate(offers, 40)
    assert (specs["large"].bits, specs["small"].bits) == (1, 2)


def test_too_small_a_budget_is_no_mix_at_all():
    assert allocate({"a": ways((10, 1.0))}, 9) is None


curves = st.lists(
    st.tuples(st.integers(1, 50), st.floats(0.0, 100.0)), min_size=1, max_size=4, unique_by=lambda p: p[0]
)


@given(st.lists(curves, min_size=1, max_size=4), st.integers(4, 200))
def test_no_budget_is_overrun_and_at_most_one_step_is_missed(points, budget):
    offers = {str(i): ways(*curve) for i, curve in enumerate(points)}
    specs = allocate(offers, budget)
    mixes = [mix for mix in itertools.product(*offers.values()) if sum(c.nbytes for c in mix) <= budget]
    if not mixes:
        assert specs is None
        return
    chosen = [next(c for c in offers[name] if c.spec == spec) for name, spec in specs.items()]
    assert sum(c.nbytes for c in chosen) <= budget
    # the greedy solution is at most the largest single step away from the best mix
    step = max((c.harm for curve in offers.values() for c in curve), default=0.0)
    assert sum(c.harm for c in chosen) <= min(sum(c.harm for c in mix) for mix in mixes) + step + 1e-6


def test_less_than_a_bit_a_weight_is_stored_read_merged_and_laid_out_alike(family, tmp_path):
    artifact = meswitch.compress(family / "base", family / "math", tmp_path / "delta", target_bpw=0.75)
    words = {name: e for name, e in artifact.manifest.tensors.items() if e.block}
    assert {e.bits for e in words.values()} == {1}
    layout = Layout.of(artifact)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.fill(artifact, buffer)
    merged = meswitch.load_merged(family / "base", artifact.directory, torch.float32).state_dict()
    base = Checkpoint.open(family / "base")
    for name in words:
        delta = artifact.read(name).dequantize()
        assert torch.equal(layout.views(buffer)[name].dequantize(), delta)
        assert torch.allclose(merged[name], base.read(name).float() + delta, atol=1e-6)
    assert all(e.stored["weight_packed"].bytes <= 0.8 * math.prod(e.shape) / 8 for e in words.values())

"""`target_bpw`: one budget for the whole artifact."""

import pytest
import torch

import meswitch
from meswitch import Artifact
from meswitch.errors import ConfigError
from meswitch.experts.layout import Layout


@pytest.fixture
def text(family):
    return family / "calibration" / "code.jsonl"


def file_bpw(artifact: Artifact) -> float:
    return (artifact.directory / "delta.safetensors").stat().st_size * 8 / artifact.manifest.expert.parameters


def test_the_file_keeps_the_budget_and_uses_it(family, tmp_path, text):
    artifact = meswitch.compress(
        family / "base",
        family / "code",
        tmp_path / "delta",
        target_bpw=1.8,
        calibration=text,
        calibration_tokens=6000,
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
    with pytest.raises(ConfigError, match=r"target_bpw: 0.8 cannot be reached: the smallest mix takes 1\.\d+ bits"):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", target_bpw=0.8)
    assert not any(tmp_path.iterdir())


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

"""Reading ahead gives what reading gives, in any order, and the same errors."""

import shutil

import pytest
import torch

from meswitch import Artifact
from meswitch.artifact import ReadAhead
from meswitch.codec import PackedDelta
from meswitch.errors import ArtifactError


@pytest.fixture
def artifact(math_delta):
    return Artifact.open(math_delta)


def same(one, other):
    if isinstance(one, PackedDelta):
        return torch.equal(one.dequantize(), other.dequantize())
    return one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("step", [1, -1, 3])
def test_every_tensor_in_any_order(artifact, step):
    names = list(artifact.manifest.tensors)
    with ReadAhead(artifact, names) as ahead:
        for name in names[::step]:
            assert same(artifact.read(name), ahead.read(name)), name


def test_a_tensor_that_was_not_announced_or_is_asked_for_twice(artifact):
    first, second, *_ = artifact.manifest.tensors
    with ReadAhead(artifact, [first]) as ahead:
        for name in (second, first, first):
            assert same(artifact.read(name), ahead.read(name))


def test_a_damaged_tensor_is_refused_when_it_is_asked_for(math_delta, tmp_path):
    shutil.copytree(math_delta, tmp_path / "damaged")
    artifact = Artifact.open(tmp_path / "damaged")
    info = next(iter(artifact.infos.values()))
    content = bytearray(info.file.read_bytes())
    content[-1] ^= 1
    info.file.write_bytes(content)
    names = list(artifact.manifest.tensors)
    with ReadAhead(artifact, names) as ahead, pytest.raises(ArtifactError, match="checksum differs"):
        list(map(ahead.read, names))

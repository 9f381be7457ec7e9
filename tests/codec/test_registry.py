"""Codecs by name: registered here, or brought by a package that is installed."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from meswitch.codec import ME_SWITCH, CodecRequest, Parameter, Spec, codec_names, encode, find_codec, nbytes, register


def delta_of(rows, width):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * 1e-3


def test_the_default_method_is_the_first():
    assert codec_names()[0] == "me-switch"
    assert find_codec("me-switch") is ME_SWITCH


def test_a_codec_is_registered_once():
    assert register(ME_SWITCH) is ME_SWITCH
    with pytest.raises(ValueError, match="codec 'me-switch': another one of that name is registered"):
        register(replace(ME_SWITCH, uses_inputs=False))


@pytest.mark.parametrize("name", ["gzip", None])
def test_an_unknown_name_is_told_with_what_to_install(name):
    with pytest.raises(
        ValueError, match=rf"method: {name!r} is none of me-switch, .*install the package that brings it"
    ):
        find_codec(name)


def test_a_codec_of_another_package_is_imported_when_it_is_asked_for():
    code = (
        "import sys\n"
        "from meswitch.codec import find_codec\n"
        "assert 'meswitch_lab' not in sys.modules\n"
        "assert find_codec('bitdelta').name == 'bitdelta'\n"
        "assert 'meswitch_lab' in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("changed", [48, 5], ids=["all rows", "few rows"])
@pytest.mark.parametrize("salient", [0, 3])
def test_the_default_method_encodes_as_a_codec_what_it_encodes_as_packed(changed, salient):
    delta, moment = delta_of(48, 96), torch.eye(96)
    delta[changed:] = 0
    spec = Spec(2, 32, salient)
    parts, meta = ME_SWITCH.encode(delta, moment, CodecRequest(spec, 0))
    shapes = ME_SWITCH.shapes(48, 96, meta)
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == shapes
    assert sum(part.nbytes for part in parts.values()) == nbytes(shapes)
    packed = encode(delta, spec, name="a", second_moment=moment)
    assert torch.equal(ME_SWITCH.decode(parts, 48, 96, meta), packed.dequantize())
    assert set(meta) == set(ME_SWITCH.fields)


@pytest.mark.parametrize(
    ("value", "fits"), [(1, True), (8, True), (0, False), (9, False), (1.5, False)], ids=lambda value: f"{value}"
)
def test_a_parameter_has_bounds(value, fits):
    parameter = Parameter("rank", "Of the factors.", least=1, below=9, whole=True)
    if fits:
        parameter.check(value)
        return
    with pytest.raises(ValueError, match=f"rank: {value:g}: at least 1, less than 9, whole"):
        parameter.check(value)

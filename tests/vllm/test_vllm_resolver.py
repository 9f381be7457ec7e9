"""`vllm serve` finds artifacts by name in MESWITCH_DELTA_DIR, and nothing else anywhere."""

import asyncio
import shutil

import pytest

import meswitch
from meswitch.errors import ConfigError
from tests.support.vllm_engines import PROMPT
from tests.support.vllm_http import answer_of, ask, completion

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="session")
def delta_dir(by_hand):
    return by_hand[1]


@pytest.fixture(scope="session")
def url(by_hand):
    return by_hand[0]


@pytest.fixture(scope="module")
def outside(delta_dir, deltas):
    """An artifact beside the directory, and a link to it in the directory."""
    directory = delta_dir.parent / "outside"
    shutil.copytree(deltas["sql"], directory)
    (delta_dir / "linked").symlink_to(directory)
    return directory


@pytest.fixture(scope="module")
def foreign(delta_dir, family):
    """code as a change of math: all shapes are right, the base is another."""
    meswitch.compress(family / "math", family / "code", delta_dir / "foreign")
    return delta_dir / "foreign"


def test_an_expert_is_found_by_its_name(url, expected):
    assert answer_of(url, "math") == expected["math", len(PROMPT)]
    assert answer_of(url, "team/code") == expected["code", len(PROMPT)]
    models = {model["id"]: model["root"] for model in ask(url, "/v1/models")[2]["data"]}
    assert models["math"].endswith("/math")
    assert ask(url, "/v1/unload_lora_adapter", {"lora_name": "math"})[0] == 200
    assert answer_of(url, "math") == expected["math", len(PROMPT)]  # found again
    assert answer_of(url, "base") == expected["base", len(PROMPT)]


def test_a_name_that_nobody_has_is_unknown(url):
    for name in ("nobody", "math/meswitch.json", "team", "x" * 5000):
        assert completion(url, name)[0] == 404, name


def test_a_name_that_leads_out_of_the_directory_is_refused(url, outside):
    for name in ("../outside", "math/../../outside", str(outside), "linked"):
        status, _, problem = completion(url, name)
        assert status == 400, name
        assert "MESWITCH_DELTA_DIR" in problem


def test_an_artifact_of_another_base_is_refused_by_file_field_and_fix(url, foreign, expected):
    status, _, problem = completion(url, "foreign")
    assert status == 400
    assert "foreign/meswitch.json: base.fingerprint: " in problem
    assert "use that base or compress again" in problem
    assert answer_of(url, "math") == expected["math", len(PROMPT)]


def test_a_damaged_artifact_is_refused_and_the_server_goes_on(url, delta_dir, deltas, expected):
    shutil.copytree(deltas["sql"], delta_dir / "short")
    (delta_dir / "short" / "delta.safetensors").write_bytes(b"")
    status, _, problem = completion(url, "short")
    assert status == 400
    assert "short/delta.safetensors" in problem

    shutil.copytree(deltas["sql"], delta_dir / "tampered")
    file = delta_dir / "tampered" / "delta.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    status, _, problem = completion(url, "tampered")  # its header is right; the worker compares the checksums
    assert status == 400
    assert "found but could not be loaded" in problem
    assert answer_of(url, "math") == expected["math", len(PROMPT)]


def test_a_link_within_the_directory_is_a_name(delta_dir, family):
    from meswitch.vllm.resolver import DeltaResolver

    (delta_dir / "alias").symlink_to("math")
    (delta_dir / "circle").symlink_to("circle")
    resolver = DeltaResolver(delta_dir)
    found = asyncio.run(resolver.resolve_lora(str(family / "base"), "alias"))
    assert (found.lora_name, found.lora_path) == ("alias", str(delta_dir.resolve() / "math"))
    for name in ("circle", "a\0b"):
        assert asyncio.run(resolver.resolve_lora(str(family / "base"), name)) is None


def test_without_the_variable_nothing_is_registered(monkeypatch, tmp_path):
    from vllm.lora.resolver import LoRAResolverRegistry

    from meswitch.vllm.resolver import NAME, register_resolver

    monkeypatch.delenv("MESWITCH_DELTA_DIR", raising=False)
    register_resolver()
    assert NAME not in LoRAResolverRegistry.get_supported_resolvers()
    monkeypatch.setenv("MESWITCH_DELTA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"MESWITCH_DELTA_DIR: .*nowhere: not a directory"):
        register_resolver()

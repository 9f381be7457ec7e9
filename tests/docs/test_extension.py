"""The pages that say how to add something are followed from outside the package: their code, as it stands there."""

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

import meswitch
from meswitch import Artifact, Engine
from meswitch.codec import find_codec
from meswitch.errors import ConfigError
from meswitch.ops import BACKENDS
from meswitch.router import RouterError, load_router
from meswitch.router.store import write_router

PAGES = Path(__file__).parents[2] / "docs" / "develop"


@dataclass(frozen=True)
class Written:
    """What a router's file holds that a kind of another package has written."""

    kind: str
    experts: tuple[str, ...]
    words: int
    tensors_sha256: str = ""


def code_of(page: str, number: int) -> str:
    """A Python block of a page, the first being 0."""
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)[number]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(name, code)` imports code as a module of somebody else's."""
    made = []

    def write(name: str, code: str):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        made.append(name)
        return importlib.import_module(name)

    yield write
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`installed(group, name, module)` is what installing a package with that entry point does."""

    def install(group: str, name: str, target: str) -> None:
        metadata = tmp_path / f"{name.replace('-', '_')}-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.fixture
def codec(tmp_path, installed, monkeypatch):
    """The page's codec, in an installed package that nobody has imported."""
    from meswitch.codec import registry

    monkeypatch.setattr(registry, "_CODECS", dict(registry._CODECS))
    (tmp_path / "largest.py").write_text(code_of("add-a-codec.md", 0))
    installed("meswitch.codecs", "largest", "largest")
    yield
    sys.modules.pop("largest", None)


def test_a_codec_is_found_by_its_entry_point_compresses_merges_and_opens(codec, family, tmp_path):
    base, expert, out = family / "base", family / "math", tmp_path / "out"
    found = meswitch.compress(base, expert, out, method="largest", parameters={"keep": 0.05})
    assert found.bits_per_weight < 3
    assert Artifact.open(out).manifest.method.name == "largest"
    meswitch.merge(base, out, tmp_path / "merged")
    full, merged, plain = (load_file(path / "model.safetensors") for path in (expert, tmp_path / "merged", base))
    name = "model.layers.0.mlp.down_proj.weight"
    left, all_of_it = (full[name] - merged[name]).norm(), (full[name] - plain[name]).norm()
    assert 0 < left < all_of_it


def test_a_codec_refuses_what_its_parameters_do_not_allow(codec, family, tmp_path):
    with pytest.raises(ConfigError, match=r"keep: 2: at least 0\.001, at most 1"):
        meswitch.compress(
            family / "base", family / "math", tmp_path / "out", method="largest", parameters={"keep": 2.0}
        )


def test_the_test_of_the_page_on_codecs_passes(codec):
    assert find_codec("largest").name == "largest"
    names: dict = {}
    exec(compile(code_of("add-a-codec.md", 2), "add-a-codec.md", "exec"), names)
    (test,) = [value for name, value in names.items() if name.startswith("test_")]
    test()


def test_a_router_kind_is_saved_opened_and_asked(module, family, tmp_path):
    kind = module("by_length", code_of("add-a-router.md", 0))
    kind.LengthRouter(["short", "long"], 3).save(tmp_path / "router")
    loaded = load_router(tmp_path / "router", family / "base", experts=["short", "long"])
    assert [loaded.route(text).choice for text in ("hello", "tell me about the sea")] == ["short", "long"]


def test_a_backend_computes_what_the_reference_does(module, family, math_delta):
    mine = module("mine", code_of("add-a-backend.md", 0))
    try:
        answers = {}
        for name in ("mine", "reference"):
            with Engine(family / "base", {"math": math_delta}, backend=name, merged_bytes=0) as engine:
                answers[name] = engine.generate(["2 + 2 ="], model="math", max_new_tokens=8)[0].tokens
        assert answers["mine"] == answers["reference"]
        assert mine.calls > 0
    finally:
        BACKENDS.pop("mine", None)


def test_a_router_kind_of_another_package_is_found_by_its_entry_point(installed, family, tmp_path):
    (tmp_path / "by_length_package.py").write_text(code_of("add-a-router.md", 0).replace('"length"', '"by-length"'))
    written = tmp_path / "router"
    write_router(written, Written("by-length", ("short", "long"), 3), {})
    with pytest.raises(RouterError, match="kind: 'by-length' is not known to this meswitch"):
        load_router(written, family / "base")
    installed("meswitch.routers", "by-length", "by_length_package")
    try:
        assert load_router(written, family / "base").route("tell me about the sea").choice == "long"
    finally:
        sys.modules.pop("by_length_package", None)

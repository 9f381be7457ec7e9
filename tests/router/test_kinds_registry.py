"""A kind of router is one registered class: the example of docs/routing.md, as it stands there."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from meswitch.router import Router, RouterError, load_router
from meswitch.router.base import text_of
from meswitch.router.store import register_router, write_router

PAGE = Path(__file__).parents[2] / "docs" / "routing.md"


@dataclass(frozen=True)
class Written:
    kind: str
    experts: tuple[str, ...]
    words: int
    tensors_sha256: str = ""


def example():
    (code,) = re.findall(r"## Add a kind of router.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return code


def test_the_pages_new_kind_is_saved_opened_and_asked(base, tmp_path):
    code = example()
    names = {"dataclass": dataclass, "register_router": register_router, "Router": Router, "text_of": text_of}
    names |= {"write_router": write_router, "Path": Path, "__name__": __name__}
    exec(compile(code, str(PAGE), "exec"), names)
    names["LengthRouter"](["short", "long"], 3).save(tmp_path / "router")
    loaded = load_router(tmp_path / "router", base, experts=["short", "long"])
    assert [loaded.route(text).choice for text in ("hello", "tell me about the sea")] == ["short", "long"]


def test_a_kind_of_another_package_is_found_by_its_entry_point(base, tmp_path, monkeypatch):
    imports = """
from dataclasses import dataclass
from pathlib import Path
from meswitch.router.base import Router, text_of
from meswitch.router.store import register_router, write_router
"""
    (tmp_path / "by_length.py").write_text(imports + example().replace('"length"', '"by-length"'))
    metadata = tmp_path / "by_length-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: by-length\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[meswitch.routers]\nby-length = by_length\n")
    written = tmp_path / "router"
    write_router(written, Written("by-length", ("short", "long"), 3), {})
    with pytest.raises(RouterError, match="kind: 'by-length' is not known to this meswitch"):
        load_router(written, base)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_router(written, base).route("tell me about the sea").choice == "long"

"""A kind of router is one registered class: the example of docs/routing.md, as it stands there."""

import re
from dataclasses import dataclass
from pathlib import Path

from meswitch.router import Router, load_router
from meswitch.router.base import text_of
from meswitch.router.store import register, write_router

PAGE = Path(__file__).parents[2] / "docs" / "routing.md"


def test_the_pages_new_kind_is_saved_opened_and_asked(base, tmp_path):
    (code,) = re.findall(r"## Add a kind of router.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"dataclass": dataclass, "register": register, "Router": Router, "text_of": text_of}
    names |= {"write_router": write_router, "Path": Path, "__name__": __name__}
    exec(compile(code, str(PAGE), "exec"), names)
    names["LengthRouter"](["short", "long"], 3).save(tmp_path / "router")
    loaded = load_router(tmp_path / "router", base, experts=["short", "long"])
    assert [loaded.route(text).choice for text in ("hello", "tell me about the sea")] == ["short", "long"]

"""`meswitch deploy` where Ray is missing, and its page."""

import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from meswitch.cli import app

DOCS = Path(__file__).parents[2] / "docs"


def test_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(app, ["deploy", "ray", "family.toml"])
    assert result.exit_code == 1
    assert result.stderr.strip() == "error: deploy ray: Ray is not installed; run `pip install 'meswitch[ray]'`"


def test_every_option_is_documented() -> None:
    page = (DOCS / "use" / "ray.md").read_text()
    for option in get_command(app).commands["deploy"].commands["ray"].params:
        if option.opts[0].startswith("--") and option.opts[0] != "--help":
            assert f"`{option.opts[0]}`" in page, option.opts[0]

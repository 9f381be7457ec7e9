"""The reference pages name every option and every field there is."""

from pathlib import Path

import pytest

from meswitch.family import Family

DOCS = Path(__file__).parents[2] / "docs" / "use"


@pytest.mark.parametrize("section", ["base", "compress", "expert", "router", "engine", "server"])
def test_every_field_of_a_family_is_documented(section):
    heading = "## [[expert]]" if section == "expert" else f"## [{section}]"
    text = (DOCS / "family.md").read_text().split(f"{heading}\n")[1].split("\n## ")[0]
    annotation = Family.model_fields[section].annotation
    fields = getattr(annotation, "__args__", (annotation,))[0].model_fields
    documented = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert documented == list(fields)


def test_the_example_family_is_valid(tmp_path):
    text = (DOCS / "family.md").read_text().split("```toml\n")[1].split("```")[0]
    (tmp_path / "family.toml").write_text(text)
    family = Family.load(tmp_path)
    assert family.names == ["math", "code"]
    assert family.engine.host_bytes == 16 << 30


@pytest.mark.parametrize(
    "command", ["compress", "inspect", "verify", "merge", "diff", "extract-lora", "plan", "generate", "chat"]
)
def test_every_option_is_documented(command):
    from typer.main import get_command

    from meswitch.cli import app

    page = (DOCS / "cli.md").read_text()
    general, text = page.split("\n## ")[0], page.split(f"\n## {command}\n")[1].split("\n## ")[0]
    for option in get_command(app).commands[command].params:
        name = option.opts[0]
        if name.startswith("--") and name != "--help":
            assert name in text or name in general, name

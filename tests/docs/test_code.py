"""Code in the documents: Python compiles and imports what there is, some of it runs; TOML and JSON can be read."""

import ast
import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [
    pytest.param(kind, code, id=f"{page.relative_to(ROOT)} {number}")
    for page in PAGES
    for number, (kind, code) in enumerate(BLOCK.findall(page.read_text()))
]


@pytest.mark.parametrize(("kind", "code"), BLOCKS)
def test_code_of_the_documents_is_what_it_says_it_is(kind, code):
    if kind == "toml":
        tomllib.loads(code)
    elif kind == "json":
        for line in code.splitlines():
            json.loads(line.replace("...", "0"))
    elif kind == "python":
        for statement in ast.walk(ast.parse(code)):
            if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith("meswitch"):
                module = importlib.import_module(statement.module)
                for name in statement.names:
                    assert hasattr(module, name.name), f"{statement.module}.{name.name}"


@pytest.fixture
def here(family, tmp_path, monkeypatch):
    """A directory with what the pages' programs name."""
    for name in ("base", "math"):
        (tmp_path / name).symlink_to(family / name)
    lines = (family / "calibration" / "math.jsonl").read_text().splitlines()[:8]  # too few to train on: quick
    (tmp_path / "math.jsonl").write_text("\n".join(lines) + "\n")
    by_domain: dict[str, list[str]] = {}
    for line in (family / "routing.jsonl").read_text().splitlines():
        by_domain.setdefault(json.loads(line)["domain"], []).append(line)
    for name, part in (("train.jsonl", slice(0, 12)), ("dev.jsonl", slice(12, 16))):
        (tmp_path / name).write_text("".join(f"{row}\n" for rows in by_domain.values() for row in rows[part]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_program_without_a_server_runs(here, capsys):
    (program,) = [code for kind, code in BLOCK.findall((ROOT / "README.md").read_text()) if "meswitch.Engine" in code]
    exec(compile(program, "README.md", "exec"), {})
    assert (here / "deltas" / "math" / "meswitch.json").exists()
    assert capsys.readouterr().out.strip()


def test_a_router_is_trained_saved_and_asked_from_python(here, capsys):
    (program,) = [
        code
        for kind, code in BLOCK.findall((ROOT / "docs" / "use" / "router.md").read_text())
        if kind == "python" and "train_router" in code
    ]
    exec(compile(program, "router.md", "exec"), {})
    assert (here / "router" / "router.json").exists()
    assert capsys.readouterr().out.splitlines()[0].split()[0] in ("math", "code", "instruct", "sql", "base", "None")

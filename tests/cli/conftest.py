"""The real commands, run in this process; a family whose artifacts and router are made."""

import json
from pathlib import Path

import pytest

from tests.support.command_line import Cli


@pytest.fixture(scope="session")
def cli() -> Cli:
    return Cli()


def write_family(file: Path, family: Path, deltas: dict[str, Path], router: Path, head: str = "") -> Path:
    """A family.toml over the trained family, with artifacts at `deltas`."""
    lines = [f'[base]\npath = "{family}/base"\n{head}\n[router]\npath = "{router}"\n[engine]\nkv_cache_tokens = 4096']
    lines += [
        f'[[expert]]\nname = "{name}"\ndelta = "{delta}"\nsource = "{family}/{name}"\n'
        f'calibration = "{family}/calibration/{name}.jsonl"'
        for name, delta in deltas.items()
    ]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def new_family(family, tmp_path):
    """`new_family("math", "code", head="[compress]...")` writes a family.toml of experts not yet compressed."""

    def write(*names, head=""):
        deltas = {name: tmp_path / "runs" / name for name in names}
        return write_family(tmp_path / "family.toml", family, deltas, tmp_path / "router", head)

    return write


@pytest.fixture(scope="session")
def ready_family(family, deltas, tmp_path_factory, cli) -> Path:
    """A family.toml whose experts are compressed and whose router is trained on a few questions of each."""
    root = tmp_path_factory.mktemp("ready")
    rows = [json.loads(line) for line in (family / "routing.jsonl").read_text().splitlines()]
    few = [row for name in ("math", "code", "instruct", "sql", "other") for row in _first(rows, name, 30)]
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in few))
    file = write_family(root / "family.toml", family, deltas, root / "router")
    cli.ok("router", "train", "--family", file, "--data", root / "rows.jsonl")
    return file


def _first(rows, domain, count):
    return [row for row in rows if row["domain"] == domain][:count]

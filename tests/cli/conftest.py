"""The real commands, run in this process; a family whose artifacts and router are made."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meswitch.cli import app


class Cli:
    """`cli("inspect", path)` runs a command; `cli.json(...)` gives its parsed stdout."""

    def __call__(self, *args, stdin=None, **env):
        return CliRunner(env={"COLUMNS": "120", **env}).invoke(app, [str(arg) for arg in args], input=stdin)

    def ok(self, *args, **options):
        result = self(*args, **options)
        assert result.exit_code == 0, result.output
        return result

    def json(self, *args, **options):
        return json.loads(self.ok(*args, "--json", **options).stdout)

    def error(self, *args, **options):
        """The one line of an error, checked to be all there is."""
        result = self(*args, **options)
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        *notes, line = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert not any("error" in note or "Traceback" in note for note in notes)
        return line.removeprefix("error: ")


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

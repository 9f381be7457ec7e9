"""Runs the product's commands in this process."""

import json

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

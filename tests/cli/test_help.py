"""`--help` comes at once, teaches, and shells complete."""

import os
import subprocess
import sys

import pytest
from typer.main import get_command

from meswitch.cli import app

# typer itself reads values with pydantic
HEAVY = ("torch", "transformers", "numpy", "triton", "vllm", "ray", "fastapi", "uvicorn", "safetensors",
         "tokenizers", "huggingface_hub", "matplotlib", "lm_eval", "peft")  # fmt: skip


def commands(group=None, path=()):
    for name, command in (group or get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_the_help_of_no_command_loads_a_heavy_package():
    code = f"""
import sys
from typer.testing import CliRunner
from meswitch.cli import app
for path in {[list(path) for path, _ in commands()]!r} + [[]]:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0, (path, result.output)
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (path, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_option_and_argument_says_what_it_is(path):
    command = dict(commands())[path]
    assert command.help
    for option in command.params:
        assert getattr(option, "help", None), f"{option.name} has no help"


def test_every_command_that_reports_can_report_json():
    silent = {("chat",), ("key",)}
    for path, command in commands():
        flags = {flag for option in command.params for flag in option.opts}
        assert "--json" in flags or path in silent, path


@pytest.mark.parametrize(("shell", "line"), [("bash", "meswitch comp"), ("zsh", "meswitch comp")])
def test_shells_complete_commands(shell, line):
    words = {"COMP_WORDS": line, "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": line}
    environment = {**os.environ, **words, "_MESWITCH_COMPLETE": f"complete_{shell}"}
    code = "import sys; sys.argv = ['meswitch']; from meswitch.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "compress" in done.stdout, done.stderr


def test_completion_can_be_installed(cli):
    assert "--install-completion" in cli.ok("--help").stdout

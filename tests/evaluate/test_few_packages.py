"""Measuring needs neither the command line's packages nor the server's."""

import subprocess
import sys

CODE = """
import sys
for name in ("rich", "typer", "pydantic", "fastapi", "uvicorn"):
    sys.modules[name] = None
import meswitch.compression, meswitch.evaluate
print(meswitch.evaluate.Report(()).to_markdown().partition(" |")[0])
"""


def test_it_is_imported_without_rich_typer_and_pydantic() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "| task\n"), done.stderr

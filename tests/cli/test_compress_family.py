"""compress --family: many experts, kept where they are whole, and an interrupt in the middle."""

import os
import signal
import subprocess
import sys
import time

import pytest

from meswitch import Artifact
from meswitch.errors import ArtifactError

MAIN = [sys.executable, "-c", "from meswitch.cli import main; main()"]


def modified(directory):
    return (directory / "meswitch.json").stat().st_mtime_ns


def test_a_family_is_compressed_with_its_settings_and_kept_afterwards(cli, new_family, tmp_path):
    file = new_family("math", "sql", head='[compress]\nbits = 3\ngroup_size = "row"\nsalient = 0')
    rows = cli.json("compress", "--family", file, "--calibration", "none")
    assert [row["expert"] for row in rows] == ["math", "sql"]
    method = Artifact.open(tmp_path / "runs/math").manifest.method
    assert (method.bits, method.group_size, method.salient) == (3, None, 0)
    before = modified(tmp_path / "runs/math")
    again = cli.ok("compress", "--family", file)
    assert again.stderr.count("is kept; --overwrite makes it anew") == 2
    assert modified(tmp_path / "runs/math") == before


def test_only_the_named_expert_is_made(cli, new_family, tmp_path):
    cli.ok("compress", "--family", new_family("math", "sql"), "--expert", "sql", "--calibration-tokens", 300)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["sql"]
    calibration = Artifact.open(tmp_path / "runs/sql").manifest.method.calibration
    assert (calibration.source, calibration.tokens) == ("sql.jsonl", 300)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("calibration/sql.jsonl", "expert 'sql': calibration: {family}/nothing: no such file; give a .txt"),
        ("sql", "expert 'sql': source: {family}/nothing: no such directory; give a checkpoint's directory"),
    ],
)
def test_what_is_wrong_of_the_last_expert_is_said_before_the_first_is_made(
    cli, family, new_family, tmp_path, wrong, message
):
    file = new_family("math", "sql")
    file.write_text(file.read_text().replace(f'"{family}/{wrong}"', f'"{family}/nothing"'))
    assert cli.error("compress", "--family", file).startswith(f"{file}: {message.format(family=family)}")
    assert not (tmp_path / "runs").exists()


def test_other_settings_are_told_and_overwrite_applies_them(cli, new_family, tmp_path):
    cli.ok("compress", "--family", new_family("math"), "--calibration", "none")
    file = new_family("math", head="[compress]\nbits = 4")
    kept = cli.ok("compress", "--family", file, "--calibration", "none")
    assert f"although its bits differ from {file}'s" in kept.stderr
    cli.ok("compress", "--family", file, "--calibration", "none", "--overwrite")
    assert Artifact.open(tmp_path / "runs/math").manifest.method.bits == 4


def test_a_damaged_artifact_is_made_anew(cli, new_family, tmp_path):
    file = new_family("math")
    cli.ok("compress", "--family", file, "--calibration", "none")
    data = tmp_path / "runs/math/delta.safetensors"
    data.write_bytes(data.read_bytes()[:-10])
    assert "math: made anew, because" in cli.ok("compress", "--family", file, "--calibration", "none").stderr
    Artifact.open(tmp_path / "runs/math").verify()


def test_a_directory_of_something_else_is_left_alone(cli, new_family, tmp_path):
    (tmp_path / "runs/math").mkdir(parents=True)
    (tmp_path / "runs/math/thesis.txt").write_text("text")
    line = cli.error("compress", "--family", new_family("math"), "--overwrite")
    assert "already exists; choose another" in line
    line = cli.error("compress", "--family", new_family("math"))
    assert "expert 'math': delta:" in line
    assert (tmp_path / "runs/math/thesis.txt").read_text() == "text"


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_loadable_and_the_same_command_goes_on(cli, new_family, tmp_path):
    file = new_family("math", "sql")
    command = [*MAIN, "compress", "--family", str(file), "--calibration-tokens", "1500"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it ignored
    )
    wait_for(tmp_path / "runs/math.partial", process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in stderr
    assert stdout == ""
    for name in ("math", "sql", "math.partial"):
        with pytest.raises(ArtifactError):
            Artifact.open(tmp_path / "runs" / name)
    rows = cli.json("compress", "--family", file, "--calibration-tokens", "1500")
    assert [row["expert"] for row in rows] == ["math", "sql"]
    for name in ("math", "sql"):
        Artifact.open(tmp_path / "runs" / name).verify()
    assert not (tmp_path / "runs/math.partial").exists()


def wait_for(path, process):
    for _ in range(6000):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    assert path.exists(), process.communicate()[1]


def test_a_family_of_exact_experts_is_data_free(cli, family, new_family, tmp_path):
    file = new_family("math", head='[compress]\nbits = "exact"')
    message = "calibration: bits: exact: nothing is rounded, chosen or trained; leave calibration out"
    assert cli.error("compress", "--family", file) == message
    cli.ok("compress", "--family", file, "--calibration", "none")
    assert Artifact.open(tmp_path / "runs/math").manifest.method.name == "exact"
    kept = cli.ok("compress", "--family", file, "--calibration", "none")
    assert "is kept; --overwrite" in kept.stderr

"""Compression that is stopped half-way: nothing half-written is loadable, and the next run goes on."""

import os
import resource
import signal
import subprocess
import sys

import pytest

import meswitch
from meswitch import Artifact
from meswitch.artifact.writer import ArtifactWriter
from meswitch.errors import ArtifactError


class Stop(BaseException):
    """What a test raises in the middle of a compression."""


def stop_after(count):
    def progress(done, total, name):
        if done == count:
            raise Stop

    return progress


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 50 KB, so that the small family has several."""
    original = ArtifactWriter.__init__

    def with_small_shards(self, out, plan, **options):
        original(self, out, plan, **options | {"shard_bytes": 50_000})

    monkeypatch.setattr(ArtifactWriter, "__init__", with_small_shards)


def test_an_interrupted_run_leaves_nothing_loadable_and_resumes(family, tmp_path, small_shards):
    out, done = tmp_path / "delta", []
    with pytest.raises(Stop):
        meswitch.compress(family / "base", family / "math", out, progress=stop_after(30))
    assert not out.exists()
    with pytest.raises(ArtifactError, match="interrupted, run the same `meswitch compress` again"):
        Artifact.open(out)
    with pytest.raises(ArtifactError, match="unfinished"):
        Artifact.open(tmp_path / "delta.partial")
    meswitch.compress(family / "base", family / "math", out, progress=lambda d, t, name: done.append(name))
    assert 0 < len(done) < 57 - 20
    whole = meswitch.compress(family / "base", family / "math", tmp_path / "whole")
    resumed = Artifact.open(out)
    assert len({part.file for e in resumed.manifest.tensors.values() for part in e.stored.values()}) > 3
    for name, entry in whole.manifest.tensors.items():
        theirs = resumed.manifest.tensors[name]
        assert {k: p.sha256 for k, p in entry.stored.items()} == {k: p.sha256 for k, p in theirs.stored.items()}


def test_other_options_start_over_instead_of_mixing(family, tmp_path, small_shards):
    with pytest.raises(Stop):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", progress=stop_after(30))
    artifact = meswitch.compress(family / "base", family / "math", tmp_path / "delta", bits=3)
    assert {e.bits for e in artifact.manifest.tensors.values() if e.kind == "packed"} == {3}


def test_a_shard_that_was_damaged_meanwhile_is_made_again(family, tmp_path, small_shards):
    with pytest.raises(Stop):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", progress=stop_after(30))
    shard = next((tmp_path / "delta.partial").glob("delta-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    meswitch.compress(family / "base", family / "math", tmp_path / "delta").verify()


def test_an_existing_artifact_is_kept_unless_it_may_be_replaced(family, tmp_path):
    meswitch.compress(family / "base", family / "math", tmp_path / "delta")
    with pytest.raises(ArtifactError, match="already exists; use --overwrite"):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", bits=4)
    replaced = meswitch.compress(family / "base", family / "math", tmp_path / "delta", bits=4, overwrite=True)
    assert replaced.manifest.method.bits == 4
    assert [p.name for p in tmp_path.iterdir()] == ["delta"]


def test_a_directory_that_is_no_artifact_is_never_replaced(family, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("text")
    with pytest.raises(ArtifactError, match="already exists; choose another --out"):
        meswitch.compress(family / "base", family / "math", tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious/thesis.txt").read_text() == "text"


def run(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options)


def test_a_full_disk_is_reported_and_leaves_nothing_loadable(family, tmp_path):
    code = f"import meswitch; meswitch.compress({str(family / 'base')!r}, {str(family / 'math')!r}, 'delta')"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    result = run(code, cwd=tmp_path, preexec_fn=limit)
    assert result.returncode != 0
    assert "delta.partial: " in result.stderr
    assert "free some" in result.stderr
    assert "goes on where it stopped" in result.stderr
    assert not (tmp_path / "delta").exists()
    assert run(code, cwd=tmp_path).returncode == 0
    Artifact.open(tmp_path / "delta").verify()


def test_ctrl_c_leaves_nothing_loadable(family, tmp_path):
    code = (
        "import os, signal, meswitch\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "def stop(done, total, name):\n"
        "    if done == 20: os.kill(os.getpid(), signal.SIGINT)\n"
        f"meswitch.compress({str(family / 'base')!r}, {str(family / 'math')!r}, 'delta', progress=stop)"
    )
    result = run(code, cwd=tmp_path, env={**os.environ})
    assert result.returncode != 0
    assert "KeyboardInterrupt" in result.stderr
    assert not (tmp_path / "delta").exists()

"""Compression that is stopped half-way: nothing half-written is loadable, and the next run goes on."""

import json
import multiprocessing
import os
import resource
import signal
import sys

import pytest
import torch

import meswitch
from meswitch import Artifact
from meswitch.artifact import writer
from meswitch.errors import ArtifactError


class Stop(BaseException):
    """What a test raises in the middle of a compression."""


def stop_after(count):
    """Progress that stops the work once so many tensors are done."""
    told = []

    def progress(phase, done, total, what):
        told.append(what)
        if len(told) > count:
            raise Stop

    return progress


def files(artifact):
    """What is in it, its date left out."""
    found = {path.name: path.read_bytes() for path in artifact.iterdir() if path.name != "meswitch.json"}
    manifest = json.loads((artifact / "meswitch.json").read_text())
    del manifest["provenance"]
    return found | {"meswitch.json": manifest}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 50 KB, so that the small family has several; what is added is kept at once."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 50_000)
    monkeypatch.setattr(writer, "PIECE_SECONDS", 0.0)


# Processes that are made to fail. A server forks them, so that torch and the model's classes are imported once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["meswitch.compression.pipeline", "transformers.models.mistral.modeling_mistral"])


def ended(work, *args):
    """The exit status of a process that does the work and ends."""
    process = PROCESSES.Process(target=work, args=args)
    process.start()
    process.join(600)
    return process.exitcode


def compress_until_killed(base, expert, out, options, phase, count):
    """A compression that keeps what it does at once, and kills itself once a phase has told so often how far it is."""
    torch.set_num_threads(1)
    writer.PIECE_SECONDS = writer.SAVE_SECONDS = 0.0
    writer.SAVE_SHARE = float("inf")
    seen = []

    def progress(*told):
        if "the next ones" not in told[3]:  # of calibration text: what is told within a batch is not saved yet
            seen.append(told[0])
        if seen.count(phase) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    meswitch.compress(base, expert, out, progress=progress, **options)


TEXT = {"calibration_tokens": 1000, "distill": 0}
# phase, how often it has told, and how often it tells at most in the run that goes on
WORK = {
    "data-free": ({}, "compressing", 50, 11),
    "calibrated": (TEXT, "compressing", 50, 11),
    "text": (TEXT | {"calibration": "self", "calibration_tokens": 400}, "writing calibration text", 1, 0),
    "budget": (TEXT | {"target_bpw": 2.3, "calibration_tokens": 300}, "compressing", 26, 8),
    "training": (TEXT | {"distill": 6}, "training", 4, 3),
    "blocks": (TEXT | {"distill": 3, "distill_scope": "block"}, "training", 9, 3 + 4),
}


@pytest.mark.parametrize("work", WORK)
def test_a_killed_process_loses_its_last_seconds_and_the_bytes_are_those_of_one_that_was_not(
    family, pair, tmp_path_factory, tmp_path, work
):
    options, phase, count, most = WORK[work]
    if options and "calibration" not in options:
        lines = (family / "calibration" / "math.jsonl").read_text().splitlines(keepends=True)[:40]
        text = tmp_path_factory.mktemp("text") / "math.jsonl"
        text.write_text("".join(lines))
        options = options | {"calibration": str(text)}
    small = work in ("budget", "training", "blocks")  # whose work grows with the model
    checkpoints = pair(num_hidden_layers=3) if small else (family / "base", family / "math")
    out, told = tmp_path / "made" / "delta", []
    out.parent.mkdir()
    assert ended(compress_until_killed, *checkpoints, out, options, phase, count) == -signal.SIGKILL
    with pytest.raises(ArtifactError, match="interrupted, run the same `meswitch compress` again"):
        Artifact.open(out)
    meswitch.compress(*checkpoints, out, progress=lambda *step: told.append(step[0]), **options)
    assert told.count(phase) <= most
    assert [path.name for path in out.parent.iterdir()] == ["delta"]
    meswitch.compress(*checkpoints, tmp_path / "whole", **options)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("count", [3, 30, 57])
def test_where_a_run_is_stopped_does_not_show_in_its_shards(family, tmp_path, small_shards, count):
    out = tmp_path / "delta"
    with pytest.raises(Stop):
        meswitch.compress(family / "base", family / "math", out, progress=stop_after(count))
    with pytest.raises(ArtifactError, match="unfinished"):
        Artifact.open(tmp_path / "delta.partial")
    meswitch.compress(family / "base", family / "math", out)
    meswitch.compress(family / "base", family / "math", tmp_path / "whole")
    assert len(list(out.glob("delta-*.safetensors"))) > 3
    assert files(out) == files(tmp_path / "whole")


def test_an_interrupt_keeps_what_is_done_however_little(family, tmp_path):
    told = []
    with pytest.raises(Stop):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", progress=stop_after(30))
    meswitch.compress(family / "base", family / "math", tmp_path / "delta", progress=lambda *step: told.append(step))
    assert len(told) == 1 + 57 - 30
    assert told[0][1] > 0


def test_other_options_start_over_instead_of_mixing(family, tmp_path, small_shards):
    with pytest.raises(Stop):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", progress=stop_after(30))
    artifact = meswitch.compress(family / "base", family / "math", tmp_path / "delta", bits=3)
    assert {e.bits for e in artifact.manifest.tensors.values() if e.kind == "packed"} == {3}
    assert len(list((tmp_path / "delta").glob("delta-*.safetensors"))) > 3


@pytest.mark.parametrize("what", ["artifact/delta-*", "pieces/*"])
def test_what_was_damaged_meanwhile_is_made_again(family, tmp_path, small_shards, what):
    with pytest.raises(Stop):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", progress=stop_after(30))
    file = next((tmp_path / "delta.partial").glob(what))
    file.write_bytes(file.read_bytes()[:-7])
    meswitch.compress(family / "base", family / "math", tmp_path / "delta").verify()


def test_one_process_at_a_time_writes_an_artifact(family, tmp_path):
    def progress(*step):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta")

    with pytest.raises(ArtifactError, match=r"delta\.partial: another process is compressing to it"):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", progress=progress)


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


def compress_and_report(pair, out, said, **options):
    """A compression to which a fault happens; what it says on stderr goes to a file."""
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    meswitch.compress(*pair, out, **options)


def compress_on_a_full_disk(pair, out, said):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    compress_and_report(pair, out, said)


def test_a_full_disk_is_reported_and_leaves_nothing_loadable(family, tmp_path):
    pair, out, said = (family / "base", family / "math"), tmp_path / "delta", tmp_path / "said"
    assert ended(compress_on_a_full_disk, pair, out, said) == 1
    assert "delta.partial: " in said.read_text()
    assert "free some" in said.read_text()
    assert "goes on where it stopped" in said.read_text()
    assert not out.exists()
    meswitch.compress(*pair, out).verify()


def compress_until_ctrl_c(pair, out, said):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    seen = []

    def stop(*told):
        seen.append(told)
        if len(seen) == 20:
            os.kill(os.getpid(), signal.SIGINT)

    compress_and_report(pair, out, said, progress=stop)


def test_ctrl_c_leaves_nothing_loadable(family, tmp_path):
    said = tmp_path / "said"
    assert ended(compress_until_ctrl_c, (family / "base", family / "math"), tmp_path / "delta", said) != 0
    assert "KeyboardInterrupt" in said.read_text()
    assert not (tmp_path / "delta").exists()

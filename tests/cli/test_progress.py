"""Long work says how far it is: what is left, and lines where there is no terminal."""

import pytest

from meswitch import Artifact, merge
from meswitch.checkpoint import Checkpoint
from meswitch.cli.console import Lines, Timing, duration


class Clock:
    """Seconds, as a test says."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(clock):
    """`lines(10, 20, ...)` tells of steps of 100 at seconds and gives the lines that were written."""
    written = []
    tell = Lines("math", written.append, clock)

    def run(seconds, done, phase="training"):
        clock.now = seconds
        before = len(written)
        tell(phase, done, 100, f"step {done}")
        return written[before:]

    return run


def test_a_line_says_what_is_done_and_what_is_left(lines):
    lines(0, 0)
    assert lines(15, 10) == ["math: training, 10%, 15 s, about 2 min 15 s left (step 10)"]


def test_lines_are_ten_seconds_and_five_percent_apart_or_a_minute(lines):
    lines(0, 0)
    assert not lines(9, 9)
    assert lines(10, 10)
    assert not lines(19, 40)
    assert lines(21, 41)
    assert not lines(40, 44)
    assert lines(82, 45)


def test_a_short_run_writes_none(lines):
    assert not any(lines(step / 20, step) for step in range(101))


def test_a_new_phase_is_timed_from_its_own_begin(lines):
    lines(0, 0)
    lines(100, 90)
    assert not lines(101, 0, "merging")
    assert lines(121, 50, "merging") == ["math: merging, 50%, 20 s, about 20 s left (step 50)"]


def test_what_an_earlier_run_did_says_nothing_about_the_pace(clock):
    timing = Timing(clock)
    timing.update("compressing", 90, 100)
    clock.now = 10
    timing.update("compressing", 95, 100)
    assert timing.left == 10


@pytest.mark.parametrize(("seconds", "text"), [(8.4, "8 s"), (250, "4 min 10 s"), (7500, "2 h 5 min")])
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text


def test_merging_and_verifying_tell_how_far_they_are(family, math_delta, tmp_path):
    told, artifact = [], Artifact.open(math_delta)

    def progress(*step):
        told.append(step)

    merge(family / "base", math_delta, tmp_path / "merged", progress=progress)
    artifact.verify(progress)
    artifact.check_base(Checkpoint.open(family / "base"), full=True, progress=progress)
    for phase in ("merging", "reading the artifact", "reading the base"):
        done = [step[1] for step in told if step[0] == phase]
        assert len(done) == len(artifact.manifest.tensors)
        assert done == sorted(done)
        assert {step[2] >= done[-1] for step in told if step[0] == phase} == {True}

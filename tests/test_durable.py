"""A directory that replaces another, stopped after every step: what is opened next is whole, and old or new."""

import os
import shutil
from pathlib import Path

import pytest

from meswitch import Artifact, durable
from meswitch.durable import recover_directory, replace_directory
from meswitch.errors import ConfigError


class StoppedError(Exception):
    """The process ends here."""


def made(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    for name in ("a", "b"):
        (path / name).write_text(text)
    return path


def text_of(path: Path) -> str:
    texts = {file.read_text() for file in path.iterdir()}
    assert len(list(path.iterdir())) == 2
    return texts.pop() if len(texts) == 1 else "mixed"


@pytest.fixture(params=["one step", "two steps"])
def way(request, monkeypatch):
    if request.param == "two steps":
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    return request.param


def stop_at(monkeypatch, number: int) -> list[str]:
    """Whatever changes the disk is counted; the number-th does not happen, nor anything after it."""
    seen: list[str] = []

    def counted(name, real):
        def step(*args, **kwargs):
            seen.append(name)
            if len(seen) >= number:
                raise StoppedError(name)
            return real(*args, **kwargs)

        return step

    monkeypatch.setattr(Path, "rename", counted("rename", Path.rename))
    monkeypatch.setattr(durable, "_exchange", counted("exchange", durable._exchange))
    monkeypatch.setattr(shutil, "rmtree", counted("rmtree", shutil.rmtree))
    return seen


def test_wherever_it_stops_the_old_or_the_new_directory_is_there(way, tmp_path):
    found = []
    for number in range(1, 20):
        target, new = made(tmp_path / f"{number}/it", "old"), made(tmp_path / f"{number}/it.partial", "new")
        with pytest.MonkeyPatch.context() as patch:
            seen = stop_at(patch, number)
            done = False
            try:
                replace_directory(new, target)
                done = True
            except StoppedError:
                pass
        recover_directory(target)
        found.append(text_of(target))
        again = made(tmp_path / f"{number}/again", "third")
        replace_directory(again, target)
        assert text_of(target) == "third"
        if done:
            assert os.listdir(target.parent) == ["it"]
            break
    assert done
    assert found[0] == "old"
    assert found[-1] == "new"
    assert "mixed" not in found
    assert len(seen) > 3


def test_one_step_leaves_no_moment_without_the_name(tmp_path):
    if not durable._exchange(made(tmp_path / "x", "x"), made(tmp_path / "y", "y")):
        pytest.skip("this file system does not exchange names")
    target, new = made(tmp_path / "it", "old"), made(tmp_path / "it.partial", "new")
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        real = Path.rename
        patch.setattr(Path, "rename", lambda self, to: (moved.append(self), real(self, to))[1])
        replace_directory(new, target)
    assert target not in moved
    assert text_of(target) == "new"


def test_who_opens_it_between_two_steps_does_not_break_the_replacement(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    target, new = made(tmp_path / "it", "old"), made(tmp_path / "it.partial", "new")
    real, steps = Path.rename, []

    def rename(self, to):
        done = real(self, to)
        steps.append(to)
        if self == target and len(steps) == 2:
            recover_directory(target)
            assert text_of(target) == "old"
        return done

    monkeypatch.setattr(Path, "rename", rename)
    replace_directory(new, target)
    assert text_of(target) == "new"
    assert os.listdir(tmp_path) == ["it"]


def test_an_artifact_whose_replacement_was_stopped_is_opened(math_delta, tmp_path):
    target = tmp_path / "math"
    shutil.copytree(math_delta, target)
    target.rename(durable._waiting(target))
    assert Artifact.open(target).manifest == Artifact.open(math_delta).manifest


def test_a_router_whose_replacement_was_stopped_is_opened(tmp_path):
    from meswitch.router import Rule, RulesRouter, load_router

    target = tmp_path / "router"
    RulesRouter([Rule("math", "text", "sum")], ("math",)).save(target)
    target.rename(durable._waiting(target))
    assert load_router(target, tmp_path).experts == ("math",)


@pytest.mark.parametrize(("file", "target"), [("file", "file/x"), ("x.partial", "x")])
def test_a_place_where_no_directory_can_be_made_is_named(tmp_path, file, target):
    (tmp_path / file).write_text("")
    with (
        pytest.raises(
            ConfigError,
            match=rf"^{tmp_path}/{target}: cannot be written \({tmp_path}/{file} is a file\); choose another",
        ),
        durable.replacing_directory(tmp_path / target),
    ):
        pytest.fail("nothing to fill")


def test_a_directory_takes_its_place_only_if_it_was_filled_without_an_error(tmp_path):
    target = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left").write_text("by a run that was stopped")
    with durable.replacing_directory(target) as partial:
        assert list(partial.iterdir()) == []
        assert not target.exists()
        (partial / "file").write_text("one")

    def fail() -> None:
        with durable.replacing_directory(target) as partial:
            (partial / "file").write_text("two")
            raise StoppedError

    with pytest.raises(StoppedError):
        fail()
    assert (target / "file").read_text() == "one"

"""Experts that are added, removed and pinned while others answer."""

import time

import pytest

from meswitch import Engine, SamplingParams
from meswitch.errors import CapacityError, ConfigError, IncompatibleError, MeswitchError, UnknownExpertError
from tests.support.models import make_pair

PROMPT = "Ben has 3 nuts"


def soon(condition) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def answer(engine, name):
    return engine.generate([PROMPT], model=name, max_new_tokens=8)[0].text


def place(engine, name):
    return next(row.place for row in engine.store.residency() if row.expert == name)


@pytest.fixture(scope="module")
def alone(family, deltas):
    with Engine(family / "base", deltas, device="cpu") as engine:
        return {name: answer(engine, name) for name in deltas}


@pytest.fixture(params=["batch", "turns"])
def engine(family, deltas, request):
    with Engine(
        family / "base", {"math": deltas["math"]}, device="cpu", slots=2, grows=True, runner=request.param
    ) as engine:
        yield engine


def test_an_expert_that_comes_later_answers_as_one_that_was_there(engine, deltas, alone):
    for name in ("code", "sql"):
        engine.add_expert(name, deltas[name])
    assert engine.names == ["base", "math", "code", "sql"]
    asked = ["sql", "math", "code", "sql"]
    found = engine.generate([PROMPT] * 4, model=asked, max_new_tokens=8)
    assert [one.text for one in found] == [alone[name] for name in asked]


def test_running_requests_end_on_an_expert_that_is_removed(engine, deltas, alone):
    engine.add_expert("code", deltas["code"])
    long = SamplingParams(max_new_tokens=300)
    running = engine.submit(PROMPT, model="code", params=long)
    next(iter(running))
    whole = engine.submit(PROMPT, model="code", params=long)
    assert soon(lambda: whole.first is not None)
    engine.remove_expert("code")
    with pytest.raises(UnknownExpertError, match="'code' does not exist"):
        engine.submit(PROMPT, model="code")
    assert running.result(60).tokens == whole.result(60).tokens
    assert soon(
        lambda: all(slot.version is None or slot.version.expert == "math" for slot in engine.store._device.slots)
    )
    engine.add_expert("code", deltas["sql"])  # the name may come again, for another
    assert answer(engine, "code") == alone["sql"]


def test_a_request_that_waits_for_an_expert_that_is_removed_fails(family, deltas):
    two = {name: deltas[name] for name in ("math", "code")}
    with Engine(family / "base", two, device="cpu", slots=1) as engine:
        running = engine.submit(
            PROMPT, model="math", params=SamplingParams(max_new_tokens=1500, temperature=1.0, seed=1)
        )
        next(iter(running))
        waiting = engine.submit(PROMPT, model="code")
        assert soon(lambda: place(engine, "code") == "host" and engine.store._loads)
        engine.remove_expert("code")
        with pytest.raises(MeswitchError, match="'code' was unloaded"):
            waiting.result(20)
        assert not running.done
        engine.cancel(running)
        assert soon(lambda: engine.load() == {"waiting": 0, "running": 0})
        assert not engine.store._loads


def test_another_expert_under_the_same_name_is_a_new_version(engine, deltas, alone):
    before = engine.store.version("math")
    engine.add_expert("math", deltas["sql"])
    assert engine.store.version("math") != before
    assert answer(engine, "math") == alone["sql"]


def test_what_does_not_fit_is_refused_and_changes_nothing(engine, deltas, alone, family, tmp_path):
    import meswitch

    base, expert = make_pair(tmp_path / "pair", family / "base", "mistral")
    meswitch.compress(base, expert, tmp_path / "other")
    with pytest.raises(IncompatibleError, match="base"):
        engine.add_expert("other", tmp_path / "other")
    for taken in ("base", "auto"):
        with pytest.raises(ConfigError, match="is taken"):
            engine.add_expert(taken, deltas["sql"])
    with pytest.raises(MeswitchError, match="no such file"):
        engine.add_expert("math", tmp_path / "nothing")
    assert engine.names == ["base", "math"]
    assert answer(engine, "math") == alone["math"]


def test_a_pinned_expert_keeps_its_slot(engine, deltas, alone):
    for name in ("code", "sql"):
        engine.add_expert(name, deltas[name])
    engine.store.keep("math")
    assert soon(lambda: place(engine, "math") == "device")
    slot = next(row.slot for row in engine.store.residency() if row.expert == "math")
    for name in ("code", "sql", "code", "sql"):
        assert answer(engine, name) == alone[name]
        assert place(engine, "math") == "device"
    assert next(row.slot for row in engine.store.residency() if row.expert == "math") == slot
    with pytest.raises(CapacityError, match="one must stay for the others"):
        engine.store.keep("sql")
    engine.store.let_go("math")
    engine.generate([PROMPT] * 2, model=["code", "sql"], max_new_tokens=2)
    assert place(engine, "math") != "device"
    counts = engine.store.counts()
    assert counts["math"].evictions == 1
    assert counts["code"].requests >= 3 > counts["code"].hits

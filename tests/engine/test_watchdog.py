"""No request waits for ever: a thread that ends or stands still is noticed, and all are told."""

import threading
import time

import pytest

from meswitch import Engine, SamplingParams
from meswitch.engine.request import TRACE
from meswitch.errors import MeswitchError

# a thread that a test ends on purpose
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
LONG = SamplingParams(max_new_tokens=1000, temperature=1.0, seed=1)


def soon(condition) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def stop_a_thread():
    raise SystemExit


@pytest.fixture(params=["batch", "turns"])
def engine(family, deltas, request):
    with Engine(family / "base", {"math": deltas["math"]}, device="cpu", runner=request.param) as engine:
        yield engine


def refused(engine, reason):
    assert reason in engine.failure
    with pytest.raises(MeswitchError, match=reason):
        engine.submit("a")


def test_the_thread_that_admits_requests_ends(engine):
    running = engine.submit("The sea", params=LONG)
    assert soon(lambda: engine.load()["running"] == 1)
    engine._events.put((running, stop_a_thread))
    assert soon(lambda: not engine._admission.is_alive())
    waiting = engine.submit("The sea", model="math", params=LONG)  # nobody will take it out of the queue
    for request in (running, waiting):
        with pytest.raises(MeswitchError, match="the thread that admits requests has ended"):
            request.result(20)
    refused(engine, "admits requests has ended")


def test_a_step_that_does_not_end_fails_its_requests_until_it_does(engine, monkeypatch):
    held, go_on = threading.Event(), threading.Event()

    def hold(*_):
        held.set()
        go_on.wait(60)

    hook = engine.model.register_forward_pre_hook(hold)
    request = engine.submit("The sea", params=LONG)
    assert held.wait(20)
    now = time.monotonic()
    engine._watchdog.look(now)
    engine._watchdog.look(now + 299)
    assert engine.failure is None
    engine._watchdog.look(now + 301)
    with pytest.raises(MeswitchError, match="the thread that computes has done nothing for 301 s"):
        request.result(20)
    refused(engine, "has done nothing")
    hook.remove()
    go_on.set()
    assert soon(lambda: engine.load() == {"waiting": 0, "running": 0})
    assert soon(lambda: engine.failure is None)  # it goes on, and so does the engine
    assert engine.generate(["The sea"], max_new_tokens=2)[0].tokens


def test_who_watches_is_told_of_every_end_once_and_before_the_answer_is_read(engine):
    seen = []
    engine.observers.append(seen.append)
    token = TRACE.set("req-abc")
    try:
        request = engine.submit("Ben has 3 nuts", model="math", params=SamplingParams(max_new_tokens=3))
    finally:
        TRACE.reset(token)
    chunks = list(request)
    assert seen == [request]
    assert chunks[-1].finish_reason == request.finish_reason
    assert request.id.startswith("req-abc-")
    assert request.trace == "req-abc"
    assert request.created <= request.started <= request.first <= request.ended
    cancelled = engine.submit("The sea", params=LONG)
    engine.cancel(cancelled)
    assert seen == [request, cancelled]
    assert cancelled.error == "the request was cancelled"

"""Each thread of a server is ended in turn: `/health` says why nobody is answered any more, and no request hangs."""

import ctypes
import threading

import httpx
import pytest

from meswitch import Family
from meswitch.launch import app_from_family, engine_from_family, policy_from_family
from meswitch.server import generation
from meswitch.threads import Workers
from tests.support.http_server import serving, user, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
LONG = {"model": "math", "messages": user("Ben has 3 nuts"), "max_tokens": 1500, "temperature": 1.0, "seed": 1}
THREADS = {
    "meswitch-batch": None,  # it says itself what ended it
    "meswitch-results": "delivers answers",
    "meswitch-admission": "admits requests",
    "meswitch-watchdog": "watches the others",
    "meswitch-open_0": "opens experts",
    "meswitch-read_0": "reads experts",
    "meswitch-copy_0": "fills slots",
    "meswitch-look_0": "looks for new versions",
    "meswitch-encode_0": "encodes prompts",
    "meswitch-server_0": "routes and changes experts",
}


@pytest.fixture
def server(family_file, monkeypatch):
    """(url, engine, its threads by name) of a server whose every thread runs."""
    others = threading.enumerate()
    monkeypatch.setattr(generation, "ENCODERS", Workers(2, "meswitch-encode"))
    monkeypatch.setattr("meswitch.server.app.ENCODERS", generation.ENCODERS)
    family = Family.load(family_file)
    with engine_from_family(family) as engine:
        auto, _ = policy_from_family(family, engine)
        with serving(app_from_family(family, engine, auto)) as url:
            for model in ("math", "code", "auto"):
                body = {"model": model, "messages": user("add"), "max_tokens": 2}
                assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
            engine.store._openers.start(lambda: None).result(10)  # it has had nothing to do yet
            yield url, engine, {thread.name: thread for thread in threading.enumerate() if thread not in others}


def end(thread, engine):
    """Have a thread raise SystemExit at its next line of Python, and give it something to do; True once it has ended.

    One that gets it in the middle of somebody's work goes on: that work has failed.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    engine._events.put((None, lambda: None))
    engine._batch._told.put(("nobody", lambda *told: None, [], False, None))
    for workers in (*engine.store.workers.values(), *engine._helpers):
        for _ in range(8):
            workers.submit(lambda: None)
    thread.join(0.05)
    return not thread.is_alive()


@pytest.mark.parametrize("name", THREADS)
def test_a_thread_that_ends_is_told_of_and_nobody_waits(server, name):
    url, engine, threads = server
    answers, errors = [], []

    def ask():
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG | {"stream": True}, timeout=30) as stream:
                answers.append((stream.status_code, list(stream.iter_lines())))
        except httpx.HTTPError as error:
            errors.append(error)

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    assert wait_until(lambda: engine.load()["running"] == 3)
    assert wait_until(lambda: end(threads[name], engine), 20)
    asked = threading.Thread(target=ask)  # comes when nobody has noticed yet, perhaps
    asked.start()
    assert wait_until(lambda: httpx.get(f"{url}/health", timeout=10).status_code == 503, 20)
    reason = THREADS[name]
    said = httpx.get(f"{url}/health", timeout=10).json()["reason"]
    assert "SystemExit" in said if reason is None else said == f"the thread that {reason} has ended"
    for thread in (*asking, asked):
        thread.join(60)
        assert not thread.is_alive()
    assert not errors  # each is told something
    assert len(answers) == 4
    late = httpx.post(f"{url}/v1/chat/completions", json=LONG | {"max_tokens": 2}, timeout=20)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_unavailable")

"""Threads that end or stand still are noticed, those without work are left alone."""

import logging
import threading

import pytest

from meswitch import threads
from meswitch.threads import Watchdog, Watched, wait_for_end


def test_an_idle_thread_has_all_the_time_there_is():
    thread, told = threading.current_thread(), []
    dog = Watchdog([Watched("idles", thread.is_alive, lambda: False, lambda: 0)], told.append, limit=1)
    dog.close()
    for now in (0, 10, 1000):
        dog.look(now)
    assert dog.failure is None
    assert not told


def test_a_problem_is_reported_once():
    thread, told = threading.current_thread(), []
    dog = Watchdog([Watched("works", thread.is_alive, lambda: True, lambda: 0)], told.append, limit=1)
    dog.close()
    for now in (5, 5.5, 7, 8):
        dog.look(now)
    assert len(told) == 1


def test_a_second_problem_is_reported_too():
    alive, told = threading.current_thread().is_alive, []
    ended = threading.Event()
    stalled = Watched("works", alive, lambda: True, lambda: 0)
    dog = Watchdog([stalled, Watched("helps", lambda: not ended.is_set())], told.append, limit=1)
    dog.close()
    for now in (5, 7):
        dog.look(now)
    ended.set()  # whoever waits for it must be told, though something else was wrong before
    for now in (8, 9):
        dog.look(now)
    assert [" ".join(each.split()[2:4]) for each in told] == ["that works", "that helps"]


@pytest.fixture
def busy(monkeypatch):
    """A thread that ends when its event is set, of which is said at once that somebody waits for it."""
    monkeypatch.setattr(threads, "SAID_SECONDS", 0.01)
    event = threading.Event()
    thread = threading.Thread(target=event.wait, daemon=True)
    thread.start()
    yield thread, event
    event.set()


def test_whoever_waits_for_a_busy_threads_end_says_so(busy, caplog):
    thread, event = busy

    class Ends(logging.Handler):
        def emit(self, record):
            event.set()

    handler = Ends(logging.WARNING)
    threads.logger.addHandler(handler)
    try:
        assert wait_for_end(thread, "computes")
    finally:
        threads.logger.removeHandler(handler)
    assert [record.getMessage() for record in caplog.records] == [
        "closing: the thread that computes is still busy; waiting for it"
    ]


def test_a_thread_that_does_not_end_is_told(busy, caplog):
    thread, _ = busy
    assert not wait_for_end(thread, "computes", limit=0.02)
    assert thread.is_alive()
    assert "the thread that computes has not ended" in caplog.records[-1].getMessage()
    assert caplog.records[-1].levelname == "ERROR"


def test_a_thread_that_ends_is_not_spoken_of(busy, caplog):
    thread, event = busy
    event.set()
    thread.join()
    assert wait_for_end(thread, "computes")
    assert not caplog.records

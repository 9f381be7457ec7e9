"""Threads that end or stand still are noticed, those without work are left alone."""

import threading

from meswitch.threads import Watchdog, Watched


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

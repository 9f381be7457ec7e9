"""Host memory: counted in bytes, read once, and never more promised than there is."""

import threading

import pytest

from meswitch.errors import CapacityError
from meswitch.slots import HostTier, Loader

SOON = 30


@pytest.fixture
def loader():
    loader = Loader(2, "test")
    yield loader
    loader.close()


def test_what_is_here_is_not_read_again(loader):
    tier = HostTier(100, loader)
    reads = []
    for _ in range(3):
        assert tier.load("a", 10, lambda: reads.append(1) or "A").result(SOON) == "A"
    assert len(reads) == 1
    assert tier.resident() == {"a": 10}


def test_the_least_recently_used_makes_room_and_what_is_pinned_does_not(loader):
    tier = HostTier(30, loader)
    for name in "abc":
        tier.load(name, 10, lambda name=name: name, pin=name == "a").result(SOON)
    tier.load("b", 10, pytest.fail)
    assert tier.load("d", 10, lambda: "d").result(SOON) == "d"
    assert set(tier.resident()) == {"a", "b", "d"}
    assert tier.load("e", 25, lambda: "e") is None
    assert set(tier.resident()) == {"a", "b", "d"}  # nothing goes for nothing
    tier.unpin("a")
    assert tier.load("e", 25, lambda: "e").result(SOON) == "e"
    assert tier.nbytes == 25


def test_room_is_taken_before_a_read_begins(loader):
    tier, gate = HostTier(15, loader), threading.Event()
    reading = tier.load("a", 10, lambda: gate.wait(SOON))
    assert tier.load("b", 10, lambda: "b") is None
    assert (tier.nbytes, tier.resident()) == (10, {})
    gate.set()
    reading.result(SOON)
    assert tier.load("b", 10, lambda: "b").result(SOON) == "b"


def test_a_read_that_fails_leaves_nothing(loader):
    tier = HostTier(10, loader)
    with pytest.raises(ZeroDivisionError):
        tier.load("a", 10, lambda: 1 / 0, pin=True).result(SOON)
    while tier.nbytes:  # it is forgotten right after who waits was told
        pass
    tier.unpin("a")
    assert tier.load("a", 10, lambda: "A").result(SOON) == "A"


def test_what_is_thrown_out_is_filled_anew_if_it_is_as_large(loader):
    tier = HostTier(20, loader)

    def refill(old):
        old.append("again")
        return old

    first = tier.load("a", 10, lambda: ["a"], refill=pytest.fail).result(SOON)
    tier.load("b", 10, lambda: ["b"], refill=pytest.fail, pin=True).result(SOON)
    assert tier.load("c", 10, pytest.fail, refill=refill).result(SOON) is first
    assert first == ["a", "again"]
    tier.unpin("b")
    assert tier.load("d", 12, lambda: ["d"], refill=pytest.fail).result(SOON) == ["d"]


def test_what_is_taken_is_kept_no_longer(loader):
    tier = HostTier(None, loader)
    tier.load("a", 10, lambda: "A")
    assert tier.take("a").result(SOON) == "A"
    assert tier.take("a") is None
    assert tier.nbytes == 0


def test_what_alone_is_over_the_budget_is_refused(loader):
    with pytest.raises(CapacityError, match=r"2 KB of host memory are needed, the budget is 1 KB"):
        HostTier(1000, loader).load("a", 2000, lambda: "A")

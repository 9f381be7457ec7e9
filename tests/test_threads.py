"""threads: as many as a model deserves and others leave free, and they sleep while they wait."""

import os
import subprocess
import sys

import pytest
import torch

from meswitch import threads

CPU = torch.device("cpu")
ASK = "import os, {first}, {then}; print(os.environ.get('OMP_WAIT_POLICY'))"


def policy(first, then, **variables):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    code = ASK.format(first=first, then=then)
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_threads_wait_passively_unless_torch_is_there_or_the_user_has_chosen():
    assert policy("meswitch", "torch") == "PASSIVE"
    assert policy("torch", "meswitch") == "None"
    assert policy("meswitch", "torch", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    assert policy("meswitch", "torch", GOMP_SPINCOUNT="1000") == "None"


def test_other_programs_get_the_users_environment(monkeypatch):
    monkeypatch.setattr(threads, "_set_here", {"OMP_WAIT_POLICY": "PASSIVE"})
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("HERE", "1")
    assert "OMP_WAIT_POLICY" not in threads.users_environment()
    assert threads.users_environment()["HERE"] == "1"


@pytest.mark.parametrize(("hidden_size", "free", "most", "wanted"), [(128, 8, 8, 1), (4096, 3, 8, 3), (4096, 8, 2, 2)])
def test_a_model_gets_what_it_deserves_and_others_leave(monkeypatch, hidden_size, free, most, wanted):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads._load, "free", lambda: free)
    assert threads.fitting(CPU, hidden_size, most) == wanted


def test_the_users_number_of_threads_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setattr(threads._load, "free", lambda: 1)
    assert threads.fitting(CPU, 4096, 6) == 6


def test_threads_are_as_before_afterwards(monkeypatch):
    before = torch.get_num_threads()
    with threads.fitting_threads(CPU, 128):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_cores_that_others_keep_busy_are_not_free(monkeypatch):
    load = threads._Load()
    load._cores = set(range(8))
    seconds = iter([(10.0, 45.0, 4.0)])  # in 10 seconds all used 45 of the cores' seconds, 4 of them this process
    load._before = (0.0, 0.0, 0.0)
    monkeypatch.setattr(load, "_read", lambda: next(seconds))
    monkeypatch.setattr(threads.time, "monotonic", lambda: 10.0)
    assert load.free() == 8 - 4
    assert load.free() == 8 - 4  # no second look so soon

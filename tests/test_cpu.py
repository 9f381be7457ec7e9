"""Threads that compute on a CPU and how they wait; products in bfloat16, where they are worth it."""

import os
import subprocess
import sys

import pytest
import torch

from meswitch import cpu

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
    assert policy("meswitch", "meswitch", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    assert policy("meswitch", "meswitch", GOMP_SPINCOUNT="1000") == "None"


def test_other_programs_get_the_users_environment(monkeypatch):
    monkeypatch.setattr(cpu, "_set_here", {"OMP_WAIT_POLICY": "PASSIVE"})
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("HERE", "1")
    assert "OMP_WAIT_POLICY" not in cpu.users_environment()
    assert cpu.users_environment()["HERE"] == "1"


@pytest.mark.parametrize(("hidden_size", "free", "most", "wanted"), [(128, 8, 8, 1), (4096, 3, 8, 3), (4096, 8, 2, 2)])
def test_a_model_gets_what_it_deserves_and_others_leave(monkeypatch, hidden_size, free, most, wanted):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu._load, "free", lambda: free)
    assert cpu.fitting(CPU, hidden_size, most) == wanted


def test_the_users_number_of_threads_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setattr(cpu._load, "free", lambda: 1)
    assert cpu.fitting(CPU, 4096, 6) == 6


def test_threads_are_as_before_afterwards(monkeypatch):
    before = torch.get_num_threads()
    with cpu.fitting_threads(CPU, 128):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_cores_that_others_keep_busy_are_not_free(monkeypatch):
    load = cpu._Load()
    load._cores = set(range(8))
    seconds = iter([(10.0, 45.0, 4.0)])  # in 10 seconds all used 45 of the cores' seconds, 4 of them this process
    load._before = (0.0, 0.0, 0.0)
    monkeypatch.setattr(load, "_read", lambda: next(seconds))
    monkeypatch.setattr(cpu.time, "monotonic", lambda: 10.0)
    assert load.free() == 8 - 4
    assert load.free() == 8 - 4  # no second look so soon


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("shape", [(8, 16, 8), (512, 1024, 512)])
def test_a_rough_product_is_near_the_product(monkeypatch, native, shape):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: native)
    rows, width, columns = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, width, generator=generator)
    right = torch.randn(width, columns, generator=generator)
    found, wanted = cpu.rough_product(left, right), left @ right
    assert found.dtype == torch.float32
    error = float((found - wanted).norm() / wanted.norm())
    if native and rows == 512:
        assert 0 < error < 1 / 250
    else:
        assert error == 0
    assert cpu.rough_product(left.bfloat16(), right.bfloat16()).dtype == torch.float32


def test_codes_from_rough_products_are_as_good(monkeypatch):
    from meswitch.codec import Spec, encode

    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(512, 1024, generator=generator) * 0.01
    inputs = torch.randn(2048, 64, generator=generator) @ torch.randn(64, 1024, generator=generator)
    inputs += torch.randn(2048, 1024, generator=generator)
    moment = inputs.T @ inputs / len(inputs)

    def loss():
        found = encode(delta, Spec(bits=2, group_size=128, salient=2), name="w", second_moment=moment)
        error = delta - found.dequantize()
        return float(((error @ moment) * error).sum() / ((delta @ moment) * delta).sum())

    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    exact = loss()
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    assert loss() == pytest.approx(exact, rel=0.02)

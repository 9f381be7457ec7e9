"""What a trace says of a decode step."""

import pytest


@pytest.fixture(scope="module")
def profile(benchmark_script):
    return benchmark_script("serving.vllm_profile")


def trace(steps: int, attention: str) -> list[dict]:
    """Steps of two layers: a linear of 5 us and attention of 3 in each, 1 us between kernels; 10 for the sampler."""
    found, now = [], 0.0
    for _ in range(steps):
        for name, took in [("linear", 5.0), (attention, 3.0)] * 2 + [("sample", 10.0)]:
            found.append({"cat": "kernel", "name": name, "ts": now, "dur": took, "args": {"grid": [1, 2, 3]}})
            now += took + 1
    return [*reversed(found), {"cat": "cpu_op", "name": "linear", "ts": 0.0, "dur": 1e6}]


def test_a_step_is_the_mean_of_the_last_ones(profile) -> None:
    found = profile.summary(trace(14, profile.ATTENTION), 2)
    assert found["step_us"] == 2 * 5 + 2 * 3 + 10 + 5
    assert found["gaps_us"] == 5
    kernels = {row["kernel"]: row for row in found["kernels"]}
    assert kernels["linear"] == {"kernel": "linear", "grid": [1, 2, 3], "a_step": 2.0, "us": 5.0}
    assert sum(row["us"] * row["a_step"] for row in found["kernels"]) + found["gaps_us"] == found["step_us"]


def test_too_few_steps_are_refused(profile) -> None:
    with pytest.raises(SystemExit, match="0 steps with"):
        profile.summary(trace(14, "another kernel"), 2)

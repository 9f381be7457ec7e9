import pytest
import torch

from meswitch.router.llm_train import Average


def run(steps, share, resume_at=None):
    weights = {"w": torch.zeros(2)}
    average = Average(weights, steps, share)
    for done in range(1, steps + 1):
        weights["w"].fill_(float(done))
        average.add(done)
        if done == resume_at:
            mean, average = dict(average.mean), Average(weights, steps, share)
            average.mean.update(mean)
    average.put()
    return weights["w"].tolist()


@pytest.mark.parametrize(("share", "expected"), [(0.0, 10.0), (0.1, 10.0), (0.4, 8.5), (1.0, 5.5)])
def test_the_last_steps_are_averaged(share, expected):
    assert run(10, share) == pytest.approx([expected] * 2)


@pytest.mark.parametrize("at", [3, 6, 7, 9])
def test_a_run_goes_on_from_the_mean_so_far(at):
    assert run(10, 0.4, resume_at=at) == run(10, 0.4)


def test_a_run_too_short_to_average_keeps_its_last_weights():
    assert run(1, 0.4) == [1.0, 1.0]

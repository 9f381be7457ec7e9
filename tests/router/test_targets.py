import pytest
import torch

from meswitch.errors import ConfigError
from meswitch.router.calibrate import choose_threshold

CONFIDENCE = torch.tensor([0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
RIGHT = torch.tensor([True, True, True, False, True, False, False])
KNOWN = torch.tensor([True, True, True, True, True, True, False])


def test_a_precision_is_kept_and_as_much_as_possible_is_answered():
    threshold = choose_threshold(CONFIDENCE, RIGHT, KNOWN, precision=0.8)
    answered = threshold <= CONFIDENCE
    assert answered.sum() == 5
    assert RIGHT[answered].double().mean() == pytest.approx(0.8)


def test_rows_of_other_that_are_answered_count_against_the_precision():
    known = torch.tensor([False, True, True, True, True, True, False])
    with pytest.raises(ConfigError, match=r"0\.99 is never reached .* ask less"):
        choose_threshold(CONFIDENCE, RIGHT, known, precision=0.99)


def test_a_coverage_is_reached_by_the_highest_threshold():
    threshold = choose_threshold(CONFIDENCE, RIGHT, KNOWN, coverage=0.5)
    assert (CONFIDENCE[KNOWN] >= threshold).sum() == 3


def test_rows_of_equal_confidence_are_answered_together():
    same = torch.full((4,), 0.5)
    right = torch.tensor([True, True, False, False])
    threshold = choose_threshold(same, right, torch.ones(4, dtype=torch.bool), precision=0.5)
    assert threshold <= 0.5
    with pytest.raises(ConfigError, match="never reached"):
        choose_threshold(same, right, torch.ones(4, dtype=torch.bool), precision=0.6)


@pytest.mark.parametrize("target", [{"precision": 0.0}, {"coverage": 1.5}])
def test_a_target_that_is_no_share_is_refused(target):
    with pytest.raises(ConfigError, match=f"target {next(iter(target))}"):
        choose_threshold(CONFIDENCE, RIGHT, KNOWN, **target)

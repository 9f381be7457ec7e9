import numpy as np
import pytest

from meswitch.errors import ConfigError
from meswitch.evaluate import Score, compare, gain_retained, wilson


def score(right: int, total: int = 1000, seed: int = 2) -> Score:
    return Score("math", seed, (True,) * right + (False,) * (total - right))


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (920, 1000, 0.9015, 0.9353)],
)
def test_wilson_gives_the_published_intervals(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-4)


def test_a_score_knows_its_accuracy_and_how_sure_it_is() -> None:
    assert (score(920).correct, score(920).total, score(920).accuracy) == (920, 1000, 0.92)
    assert score(920).interval == wilson(920, 1000)


def test_an_impossible_proportion_is_refused() -> None:
    for correct, total in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="not a proportion"):
            wilson(correct, total)


def test_gain_retained_is_one_for_a_perfect_copy_and_zero_for_the_base() -> None:
    same = gain_retained(score(900), score(900), score(100))
    assert (same.value, same.interval) == (1.0, (1.0, 1.0))
    none = gain_retained(score(100), score(900), score(100))
    assert (none.value, none.interval) == (0.0, (0.0, 0.0))


def test_gain_retained_counts_from_the_base_and_keeps_the_raw_counts() -> None:
    gain = gain_retained(score(700), score(900), score(100))
    assert gain.value == pytest.approx(0.75)
    assert gain.interval is not None
    assert gain.interval.low < 0.75 < gain.interval.high
    assert (gain.compressed, gain.expert, gain.base, gain.total) == (700, 900, 100, 1000)


def test_a_compressed_model_may_be_better_than_the_expert_or_worse_than_the_base() -> None:
    assert gain_retained(score(950), score(900), score(100)).value == pytest.approx(1.0625)
    assert gain_retained(score(60), score(900), score(100)).value == pytest.approx(-0.05)


def test_there_is_no_gain_retained_where_the_expert_gained_nothing() -> None:
    gain = gain_retained(score(5), score(7), score(7))
    assert (gain.value, gain.interval, gain.expert) == (None, None, 7)


def test_the_interval_of_gain_retained_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        expert = random.random(300) < 0.9
        kept = expert & (random.random(300) < 0.8)
        scores = [Score("math", 2, tuple(map(bool, right))) for right in (kept, expert, np.zeros(300))]
        interval = gain_retained(*scores, resamples=400).interval
        assert interval is not None
        covered += interval.low <= 0.8 <= interval.high
    assert 0.9 <= covered / 200 <= 0.99


def test_a_paired_comparison_counts_what_was_lost_and_gained() -> None:
    first = Score("math", 2, (True,) * 20 + (False,) * 20)
    second = Score("math", 2, (False,) * 10 + (True,) * 12 + (False,) * 18)
    found = compare(first, second)
    assert (found.both, found.lost, found.gained, found.neither) == (10, 10, 2, 18)
    assert found.p_value == pytest.approx(2 * 79 / 4096)  # C(12,0) + C(12,1) + C(12,2) = 79


def test_equal_answers_are_no_evidence_of_a_difference() -> None:
    assert compare(score(900), score(900)).p_value == 1.0
    assert compare(score(900), score(300)).p_value < 1e-100


def test_scores_on_other_questions_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match=r"1000 of math \(2\); 1000 of math \(3\)"):
        compare(score(900), score(900, seed=3))
    with pytest.raises(ConfigError, match="not the same questions"):
        gain_retained(score(9, 10), score(90, 100), score(0, 100))
    with pytest.raises(ConfigError, match="not the same questions"):
        compare(score(900), Score("code", 2, score(900).outcomes))

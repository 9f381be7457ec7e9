import pytest
import torch

from meswitch.router.base import TEXT_LIMIT
from meswitch.router.calibrate import auroc, calibration_error, line, temperature, threshold
from meswitch.router.embedding import bags, features
from meswitch.router.train import logistic, naive_bayes

TEXTS = ["How many apples?", "", "Write a function", "Show me all flights to Oslo", "word " * 4000]


def test_a_bag_times_a_weight_is_the_sum_of_the_features_rows():
    weight = torch.randn(64, 3)
    found = bags(TEXTS, 64)
    for i, length in enumerate(found.lengths().tolist()):
        start = int(found.offsets[i])
        expected = weight[found.indices[start : start + length]].sum(0) / length**0.5
        torch.testing.assert_close(found.weighted(weight)[i], expected)


def test_selected_bags_are_those_of_the_selected_texts():
    chosen = bags(TEXTS, 512).select(torch.tensor([3, 1, 1, 0]))
    again = bags([TEXTS[3], TEXTS[1], TEXTS[1], TEXTS[0]], 512)
    assert torch.equal(chosen.indices, again.indices)
    assert torch.equal(chosen.offsets, again.offsets)
    assert torch.equal(chosen.values, again.values)


def test_openings_of_another_topic_share_their_shape():
    ours, theirs = features("which actors starred in Alien?"), features("which rivers flow in Peru?")
    assert "^~which x x in" in set(ours) & set(theirs)


def test_numbers_count_as_numbers_not_as_these_numbers():
    assert features("add 17 and 2.5") == features("add 3 and 404")


def test_of_a_long_text_the_beginning_and_the_end_are_read():
    found = set(features("Summarise: " + "lorem ipsum " * TEXT_LIMIT + "in French please"))
    assert {"^^summarise", "french please"} <= found
    assert len(found) < 50


def test_naive_bayes_finds_the_word_that_tells():
    texts = ["red apple", "red stone", "blue apple", "blue stone"]
    weight = naive_bayes(bags(texts, 1 << 12), torch.tensor([0, 0, 1, 1]), 2, 1 << 12, 1.0)
    assert bags(["red thing", "blue thing"], 1 << 12).weighted(weight).argmax(1).tolist() == [0, 1]


def test_logistic_regression_reaches_a_stationary_point():
    torch.manual_seed(0)
    x, labels = torch.randn(200, 5), torch.randint(0, 3, (200,))
    x[torch.arange(200), labels] += 1.0
    weight, bias = logistic(x, labels, 3, l2=1e-2)
    weight.requires_grad_()
    importance = torch.bincount(labels)[labels].float().rsqrt()
    importance /= importance.mean()
    losses = torch.nn.functional.cross_entropy(x @ weight + bias, labels, reduction="none")
    ((importance * losses).mean() + 1e-2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-3


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_temperature_undoes_overconfidence(true):
    torch.manual_seed(0)
    logits = torch.randn(20_000, 4) * 2
    labels = torch.multinomial(logits.softmax(1), 1)[:, 0]
    assert temperature(logits * true, labels) == pytest.approx(true, rel=0.1)


def test_the_threshold_lies_between_known_and_other():
    known, other = torch.tensor([0.8, 0.9, 0.95, 1.0]), torch.tensor([0.1, 0.2, 0.4])
    assert threshold(known, other, 0.99) == pytest.approx(0.6)


def test_without_other_the_threshold_keeps_the_coverage():
    known = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    answered = (known >= threshold(known, known[:0], 0.99)).double().mean()
    assert answered == pytest.approx(0.99, abs=0.002)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    confidence = torch.full((1000,), 0.9)
    assert calibration_error(confidence, torch.arange(1000) < 900) == pytest.approx(0, abs=1e-6)
    assert calibration_error(confidence, torch.arange(1000) < 600) == pytest.approx(0.3, abs=1e-6)
    assert calibration_error(torch.ones(3), torch.tensor([True, True, True])) == 0


def test_auroc_counts_pairs_and_ties_by_half():
    generator = torch.Generator().manual_seed(0)
    positive = torch.randint(0, 9, (40,), generator=generator) + 2
    negative = torch.randint(0, 9, (30,), generator=generator)
    pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(positive, negative[:0]) is None


def test_perfectly_separated_rows_give_a_finite_line_and_temperature():
    logits = torch.cat([torch.full((40,), 3.0), torch.full((20,), -2.0)])
    slope, shift = line(logits, logits > 0)
    likely = torch.sigmoid(slope * logits.double() + shift)
    assert float(likely[0]) == pytest.approx(41 / 42, abs=1e-3)
    assert float(likely[-1]) == pytest.approx(1 / 22, abs=1e-3)
    two = torch.stack([logits, -logits], 1)
    assert temperature(two, (logits < 0).long()) > 0.3

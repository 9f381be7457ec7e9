import copy

import pytest

from meswitch.errors import ConfigError
from meswitch.router import OTHER

QUERIES = [
    "Tom has 12 apples and buys 3 bags with 4 apples each. How many apples does he have now?",
    "Write a Python function that returns the largest number of a list.",
    "Sort these words in alphabetical order: river stone cloud",
    "Write a SQL query: how many customers are in the table?",
    "",
    "ok",
    "¿Qué hora es? 今何時ですか",
    "word " * 3000,
]


def messages(*texts):
    return [{"role": "user", "content": text} for text in texts]


def with_threshold(router, threshold):
    other = copy.copy(router)
    other.threshold = threshold
    return other


def test_scores_are_probabilities_over_the_experts_and_other(router):
    for scores in router.scores([messages(query) for query in QUERIES]):
        assert set(scores) == {"math", "code", "instruct", "sql", OTHER}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-9)
        assert all(0 <= score <= 1 for score in scores.values())


def test_a_clear_query_goes_to_its_expert(router):
    assert [router.route(query).choice for query in QUERIES[:4]] == ["math", "code", "instruct", "sql"]


def test_a_batch_gives_what_single_queries_give(router):
    batch = router.route_batch(QUERIES)
    for query, together in zip(QUERIES, batch, strict=True):
        alone = router.route(query)
        assert alone.choice == together.choice
        assert alone.scores == pytest.approx(together.scores, abs=1e-5)


def test_no_queries_give_no_routes(router):
    assert router.route_batch([]) == []


def test_below_the_threshold_the_fallback_answers(router):
    route = with_threshold(router, 1.0).route(QUERIES[1])
    assert (route.choice, route.reason) == ("base", "abstained")
    assert max(route.scores, key=route.scores.get) == "code"


def test_a_threshold_of_zero_never_abstains(router):
    routes = with_threshold(router, 0.0).route_batch([*QUERIES, "please freeze my credit card"])
    assert all(route.reason == "scored" and route.choice in router.experts for route in routes)


def test_what_no_expert_is_for_is_refused(router):
    assert router.route("transfer 200 dollars from my savings account to my landlord").reason == "abstained"


def test_the_margin_is_between_the_two_best_experts(router):
    route = router.route("Explain this Python function: def f(x): return x + 1")
    best, second = sorted((route.scores[name] for name in router.experts), reverse=True)[:2]
    assert route.margin == pytest.approx(best - second)
    assert route.latency_ms > 0


def test_the_last_user_message_decides(router):
    talk = [
        {"role": "system", "content": "Write SQL queries and Python functions."},
        {"role": "user", "content": QUERIES[3]},
        {"role": "assistant", "content": "SELECT COUNT(*) FROM customers"},
        {"role": "user", "content": QUERIES[0]},
    ]
    assert router.route(talk).scores == pytest.approx(router.route(QUERIES[0]).scores, abs=1e-6)
    assert router.route(talk).choice == "math"


def test_text_parts_count_as_text(router):
    parts = [{"type": "text", "text": QUERIES[1]}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    assert router.route([{"role": "user", "content": parts}]).scores == router.route(QUERIES[1]).scores


@pytest.mark.parametrize("bad", [[], [{"role": "user", "content": None}], [{"role": "user"}]])
def test_a_conversation_without_text_is_refused(router, bad):
    with pytest.raises(ConfigError, match="messages"):
        router.route(bad)

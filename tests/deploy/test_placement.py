"""Which replica an expert's requests go to."""

from collections import Counter

from meswitch.deploy.replica import ranked

REPLICAS = dict.fromkeys("abcdef", ())


def test_replicas_that_hold_the_expert_come_first_together():
    groups = ranked({**REPLICAS, "b": ("math", "code"), "e": ("math",)}, "math")
    assert groups[0] == ["b", "e"]
    assert sorted(groups[1:]) == [["a"], ["c"], ["d"], ["f"]]


def test_requests_of_an_expert_that_nobody_holds_meet_at_one_replica():
    assert ranked(REPLICAS, "math") == ranked(dict(reversed(REPLICAS.items())), "math")


def test_experts_spread_and_a_lost_replica_moves_only_its_own():
    experts = [f"expert-{i}" for i in range(300)]
    first = {expert: ranked(REPLICAS, expert)[0][0] for expert in experts}
    assert min(Counter(first.values()).values()) > 25
    left = {name: () for name in REPLICAS if name != "c"}
    moved = {expert for expert in experts if ranked(left, expert)[0][0] != first[expert]}
    assert moved == {expert for expert in experts if first[expert] == "c"}


def test_what_any_replica_can_answer_goes_to_the_shortest_queue():
    assert ranked(REPLICAS, "") == [list("abcdef")]
    assert ranked({}, "") == []

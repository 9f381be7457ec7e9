import json

import pytest

from meswitch.router import RouteOption, Router, RouterError, RoutingRequest, Rule, RulesRouter, load_router, read_rules

EXPERTS = ("math", "code", "instruct", "sql")
RULES = [
    Rule("sql", "header:X-Task", "^sql$"),
    Rule("math", "metadata:team", "finance|tax"),
    Rule("code", "text", r"(?i)^\s*def \w+\("),
    Rule("other", "system", "(?i)medical"),
]


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def rules():
    return RulesRouter(RULES, EXPERTS)


def test_a_header_decides_whatever_is_asked(rules):
    request = RoutingRequest([user("hello")], headers={"x-task": "sql"})
    assert rules.route(request).choice == "sql"
    assert rules.route(request).scores == {"math": 0.0, "code": 0.0, "instruct": 0.0, "sql": 1.0, "other": 0.0}


def test_metadata_decides(rules):
    assert rules.route(RoutingRequest([user("hello")], metadata={"team": "tax office"})).choice == "math"


def test_the_text_decides(rules):
    assert rules.route("def double(x):").choice == "code"


def test_the_first_rule_that_matches_counts(rules):
    assert rules.route(RoutingRequest([user("def f(x):")], headers={"X-TASK": "sql"})).choice == "sql"


def test_a_rule_may_send_to_the_fallback(rules):
    route = rules.route([{"role": "system", "content": "You give medical advice."}, user("def f(x):x")][::-1])
    assert route.choice == "code"
    route = rules.route([{"role": "system", "content": "You give medical advice."}, user("hello")])
    assert (route.choice, route.reason) == ("base", "abstained")


def test_what_is_not_there_does_not_match():
    rules = RulesRouter([Rule("sql", "header:x", ".*"), Rule("math", "metadata:x", ".*")], EXPERTS)
    assert rules.match([user("hello")]) is None
    assert rules.match(RoutingRequest([user("hello")])) is None


def test_what_a_decision_depends_on_holds_what_the_rules_look_at(rules):
    asked = [user("hello")]
    same = [RoutingRequest(asked, headers={"x-other": "1"}), RoutingRequest(asked, metadata={"colour": "red"}), asked]
    assert len({tuple(rules.inputs(query)) for query in same}) == 1
    different = [
        *same[:1],
        RoutingRequest(asked, headers={"x-task": "sql"}),
        RoutingRequest(asked, metadata={"team": "tax"}),
        RoutingRequest(asked, metadata={"team": ""}),
        RoutingRequest([{"role": "system", "content": "medical"}, *asked]),
    ]
    assert len({tuple(rules.inputs(query)) for query in different}) == len(different)


def test_without_a_router_behind_them_the_rest_abstains(rules):
    assert rules.route("hello").reason == "abstained"


def test_the_router_behind_them_decides_the_rest(router):
    rules = RulesRouter(RULES, EXPERTS, router)
    queries = ["def f(x):", "What is 17 + 25?", "please freeze my card"]
    routes = rules.route_batch(queries)
    assert routes[0].scores["code"] == 1.0
    for query, route in zip(queries[1:], routes[1:], strict=True):
        assert route.scores == pytest.approx(router.route(query).scores, abs=1e-5)
        assert route.choice == router.route(query).choice


def test_a_request_is_a_conversation_for_any_router(router):
    assert router.route(RoutingRequest([user("What is 17 + 25?")])).choice == router.route("What is 17 + 25?").choice


@pytest.mark.parametrize("behind", [False, True])
def test_rules_are_saved_and_loaded(router, base, tmp_path, behind):
    RulesRouter(RULES, EXPERTS, router if behind else None).save(tmp_path / "rules")
    loaded = load_router(tmp_path / "rules", base, experts=EXPERTS)
    assert loaded.rules == tuple(RULES)
    assert loaded.route("def f(x):").choice == "code"
    assert (loaded.router is not None) == behind


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("chess", "text", "x"), r"rule\[0\]\.choose: 'chess'"),
        (Rule("sql", "body", "x"), r"rule\[0\]\.field: 'body'"),
        (Rule("sql", "header:", "x"), r"rule\[0\]\.field"),
        (Rule("sql", "text", "("), r"rule\[0\]\.pattern"),
    ],
)
def test_a_bad_rule_is_named(rule, message):
    with pytest.raises(RouterError, match=message):
        RulesRouter([rule], EXPERTS)


def test_rules_from_a_file(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text('[[rule]]\nchoose = "sql"\nfield = "text"\npattern = "(?i)select"\n')
    assert read_rules(file) == [Rule("sql", "text", "(?i)select")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rule]", "not valid TOML"),
        ("x = 1", "x: expected"),
        ('[[rule]]\nchoose = "sql"\nfield = "text"', r"rule\[0\]\.pattern: missing field"),
        ('[[rule]]\nchoose = "sql"\nfield = "text"\npattern = 3', r"rule\[0\]\.pattern: expected str"),
    ],
)
def test_a_bad_file_of_rules_is_named(tmp_path, text, message):
    file = tmp_path / "rules.toml"
    file.write_text(text)
    with pytest.raises(RouterError, match=message):
        read_rules(file)


def test_changed_rules_on_disk_are_refused(router, base, tmp_path):
    path = tmp_path / "rules"
    RulesRouter(RULES, EXPERTS, router).save(path)
    data = json.loads((path / "router.json").read_text())
    (path / "router.json").write_text(json.dumps(data | {"members": {}}))
    assert load_router(path, base).router is None
    (path / "router.json").write_text(json.dumps(data | {"members": {"router": "0"}}))
    with pytest.raises(RouterError, match=r"members\.router: does not match"):
        load_router(path, base)
    data["rules"][0]["choose"] = "chess"
    (path / "router.json").write_text(json.dumps(data))
    with pytest.raises(RouterError, match=r"rule\[0\]\.choose"):
        load_router(path, base)


class Growing(Router):
    """Is sure of the expert that came last, the more sure the more there are."""

    fallback = "abstain"

    def __init__(self, experts):
        self.experts = self.labels = tuple(experts)
        self.threshold = 1 - 1 / len(self.experts)

    def scores(self, messages_batch):
        return [dict.fromkeys(self.experts, 0.0) | {self.experts[-1]: 1.0} for _ in messages_batch]

    def with_expert(self, option):
        return Growing([*(name for name in self.experts if name != option.name), option.name])


def test_rules_let_the_router_behind_them_choose_an_expert_that_comes_later():
    ruled = RulesRouter(RULES, EXPERTS, Growing(EXPERTS))
    grown = ruled.with_expert(RouteOption("law", "Contracts."))
    assert grown.experts == (*EXPERTS, "law")
    assert grown.route("def double(x):").choice == "code"
    assert grown.route("hello").choice == "law"
    assert grown.threshold == grown.router.threshold > ruled.threshold
    again = grown.with_expert(RouteOption("math", "Other sums."))
    assert (again.experts, again.route("hello").choice) == (grown.experts, "math")
    own = RulesRouter(RULES, EXPERTS, Growing(EXPERTS), threshold=0.25)
    assert own.with_expert(RouteOption("law", "Contracts.")).threshold == 0.25


def test_rules_alone_say_that_nothing_chooses_an_expert_that_comes_later(rules):
    assert rules.with_expert(RouteOption("sql", "Databases.")) is rules
    with pytest.raises(RouterError, match=r"rule: none chooses 'law', and there is no router behind"):
        rules.with_expert(RouteOption("law", "Contracts."))

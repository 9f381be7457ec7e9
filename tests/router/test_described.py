"""Routes known by descriptions and example lines alone; a family without training; any list of routes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from meswitch import Family
from meswitch.cli import app
from meswitch.launch import check_router, open_family_router, router_from_family
from meswitch.router import (
    OTHER,
    Decider,
    DescribedRouter,
    OpenOptions,
    RouteOption,
    Router,
    RouterError,
    Space,
    evaluate_router,
    load_router,
    parse_options,
    read_options,
    train_router,
)
from meswitch.router import described as module
from meswitch.router.described import fit_prototypes, suits_update
from meswitch.router.train import add_described

SAID = {
    "math": "Arithmetic word problems: how many, how much.",
    "code": "Programming: write a Python function.",
    "instruct": "General instructions on text: reverse, sort, join, rewrite.",
    "sql": "Questions about a database, answered with an SQL query.",
}


@pytest.fixture(scope="module")
def space(encoder):
    return Space(encoder)


@pytest.fixture(scope="module")
def options(all_rows):
    """Five lines of each expert, of those that the tests do not ask."""
    lines = {name: [row.query for row in all_rows[::4] if row.domain == name] for name in SAID}
    return [RouteOption(name, said, tuple(lines[name][:: len(lines[name]) // 5][:5])) for name, said in SAID.items()]


@pytest.fixture(scope="module")
def described(options, space):
    return DescribedRouter(options, space)


def test_five_lines_of_each_expert_route_without_training(described, unseen):
    figures = evaluate_router(described, unseen)
    assert figures.accuracy > 0.8
    assert figures.auroc > 0.7
    assert figures.coverage > 0.5


def test_probabilities_sum_to_one_and_none_of_these_is_among_them(described):
    route = described.route("What is 17 + 25?")
    assert set(route.scores) == {*SAID, OTHER}
    assert sum(route.scores.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("many", [False, True])
def test_an_examples_score_without_it_is_that_of_routes_that_never_had_it(many, options, all_rows, space, monkeypatch):
    if many:  # each is then the mean of its lines
        lines = list(dict.fromkeys(row.query for row in all_rows))
        options = [RouteOption(f"r{i}", lines[i * 12], tuple(lines[i * 12 + 1 : i * 12 + 6])) for i in range(20)]
    found = []
    whole = module._left_out
    monkeypatch.setattr(module, "_left_out", lambda *given: found.append(whole(*given)) or found[0])
    fit_prototypes(options, space)
    line = options[0].examples[2]
    fewer = [RouteOption(o.name, o.description, tuple(e for e in o.examples if e != line)) for o in options]
    monkeypatch.undo()
    without = fit_prototypes(fewer, space).logits(space([line]))[0]
    with_it = fit_prototypes(options, space).logits(space([line]))[0]
    assert (found[0][2] - without).abs().max() < 0.2 * (with_it - without).abs().max()


def test_the_lift_changes_no_order_of_confidences_and_no_best_route(described, space, unseen):
    logits = described.prototypes.logits(space([row.query for row in unseen]))
    plain, lifted = (replace(described.prototypes, lift=lift).log_scores(logits) for lift in (0.0, 2.0))
    torch.testing.assert_close(lifted.exp().sum(1), torch.ones(len(unseen), dtype=torch.float64))
    assert torch.equal(lifted[:, :-1].argmax(1), plain[:, :-1].argmax(1))
    low, high = (scores[:, :-1].amax(1)[plain[:, :-1].amax(1).argsort()].exp() for scores in (plain, lifted))
    assert bool((high.diff() > -1e-12).all())
    assert high.mean() > low.mean() + 0.05


@pytest.mark.parametrize(
    ("right", "rows", "least", "most"), [(1.0, 400, 1.5, 6), (0.5, 400, 0, 0.1), (1.0, 2, 0.7, 1.5)]
)
def test_the_lift_is_what_left_out_examples_say_and_the_usual_one_if_they_are_few(right, rows, least, most):
    sure = torch.full((rows,), 0.5, dtype=torch.float64).log()
    found = module._lift(sure, torch.arange(rows) < right * rows)
    assert least <= found <= most


def test_descriptions_alone_are_routes_too(space):
    router = DescribedRouter([RouteOption(name, said) for name, said in SAID.items()], space)
    assert router.route(SAID["sql"]).choice == "sql"
    assert 0 < router.threshold <= 0.4


def test_a_name_without_a_description_says_nothing(space, options):
    bare = [RouteOption(option.name, "", option.examples) for option in options]
    turned = [
        RouteOption(name, "", one.examples) for name, one in zip(reversed([o.name for o in bare]), bare, strict=True)
    ]
    asked = [[{"role": "user", "content": text}] for text in ("What is 17 + 25?", "How many singers are there?")]
    for ours, theirs in zip(*(DescribedRouter(some, space).scores(asked) for some in (bare, turned)), strict=True):
        assert [ours[o.name] for o in bare] == pytest.approx([theirs[o.name] for o in turned], abs=1e-5)


def test_one_route_is_told_from_everything_else(space, options):
    router = DescribedRouter(options[:1], space)
    ours, theirs = router.scores([[{"role": "user", "content": text}] for text in (options[0].examples[0], "goodbye")])
    assert ours["math"] > theirs["math"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "routes: none"),
        ([RouteOption("a", "x"), RouteOption("a", "y")], "'a' is there twice"),
        ([RouteOption(OTHER, "x")], "means 'none of these'"),
        ([RouteOption("a")], "'a': description: missing"),
        ([RouteOption("a", "x", ("one", " "))], "'a': examples: one is empty"),
    ],
)
def test_routes_that_cannot_be_are_refused(wrong, message, space):
    with pytest.raises(RouterError, match=message):
        DescribedRouter(wrong, space)


def test_a_decision_over_any_routes_names_one_or_none(space, options):
    decider = Decider(space)
    decision = decider.decide(options[3].examples[0], options)
    assert (decision.choice, decision.confidence) == ("sql", decision.scores["sql"])
    never = decider.decide(options[3].examples[0], options, threshold=1.0)
    assert (never.choice, never.scores) == (None, decision.scores)
    assert json.loads(json.dumps(decision.to_dict()))["choice"] == "sql"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "routes: expected a list"),
        (["a"], r"routes\[0\]: expected an object with .*, found a text"),
        ([{"name": "a", "prompt": "x"}], r"routes\[0\].prompt: no such field"),
        ([{"name": 3}], r"routes\[0\].name: expected a text, found a number"),
        ([{"description": "x"}], r"routes\[0\].name: expected a text, found null"),
        ([{"name": "a", "examples": "x"}], r"routes\[0\].examples: expected a list"),
        ([{"name": "a", "examples": [None]}], r"routes\[0\].examples\[0\]: expected a text, found null"),
        ([{"name": "a", "description": "x" * 5000}], r"routes\[0\].description: 5000 characters; give at most 4096"),
        ([{"name": str(i), "description": "x"} for i in range(1001)], "1001 routes; give at most 1000"),
    ],
)
def test_routes_of_a_request_are_checked_field_by_field(data, message):
    with pytest.raises(RouterError, match=message):
        parse_options(data)


def test_routes_come_from_toml_and_json(tmp_path):
    (tmp_path / "r.toml").write_text('[[route]]\nname = "a"\ndescription = "x"\nexamples = ["one"]')
    (tmp_path / "r.json").write_text('{"routes": [{"name": "a", "description": "x", "examples": ["one"]}]}')
    (tmp_path / "wrong.json").write_text('{"rules": []}')
    assert read_options(tmp_path / "r.toml") == read_options(tmp_path / "r.json") == [RouteOption("a", "x", ("one",))]
    for name, message in (("no.json", "no such file"), ("wrong.json", "expected 'routes' and nothing else")):
        with pytest.raises(RouterError, match=message):
            read_options(tmp_path / name)


@pytest.fixture(scope="module")
def project(family, options, tmp_path_factory):
    """A family whose experts are described and whose router was never trained."""
    root = tmp_path_factory.mktemp("described")
    parts = [f'[base]\npath = "{family / "base"}"']
    for option in options:
        parts.append(
            f'[[expert]]\nname = "{option.name}"\ndelta = "{option.name}"\n'
            f"description = {json.dumps(option.description)}\nexamples = {json.dumps(option.examples)}"
        )
    (root / "family.toml").write_text("\n".join(parts))
    return root


def test_a_family_without_training_routes_by_what_it_says(project, described, unseen):
    family = Family.load(project)
    check_router(family)
    router = router_from_family(family)
    assert router.route(unseen[0].query).scores == pytest.approx(described.route(unseen[0].query).scores, abs=1e-4)


def test_a_family_that_says_nothing_of_an_expert_is_told_what_to_add(project, tmp_path):
    lines = (project / "family.toml").read_text().splitlines()
    (tmp_path / "family.toml").write_text("\n".join(lines[:-2]))  # without what is said of the last expert
    config = Family.load(tmp_path)
    for ask in (check_router, router_from_family):
        with pytest.raises(RouterError, match=r"nothing is said of 'sql'; give every .*`description` and `examples`"):
            ask(config)


def test_a_trained_router_takes_a_described_expert_in(saved, base, options, unseen):
    law = RouteOption("law", "Contracts and clauses.", tuple(f"Is clause {i} of the contract void?" for i in range(5)))
    known = [RouteOption(option.name) for option in options]
    grown = open_family_router(saved, [*known, law], OpenOptions(base))
    assert grown.route("Is clause 77 of the contract void?").choice == "law"
    assert evaluate_router(grown, [row for row in unseen if row.domain != OTHER]).accuracy > 0.9
    with pytest.raises(RouterError, match="does not know law"):
        open_family_router(saved, [*known, RouteOption("law", "Contracts and clauses.")], OpenOptions(base))


def test_a_router_takes_in_what_is_said_of_a_further_expert(described, options, base, saved):
    law = RouteOption("law", "Contracts and clauses.", tuple(f"Is clause {i} of the contract void?" for i in range(5)))
    for router in (described, load_router(saved, base)):
        grown = router.with_expert(law)
        assert grown.experts == (*SAID, "law")
        assert grown.route("Is clause 77 of the contract void?").choice == "law"
    again = described.with_expert(RouteOption("sql", "Tables.", ("Which tables are there?",)))
    assert (again.experts, again.options[-1].description) == (("math", "code", "instruct", "sql"), "Tables.")


def test_a_kind_that_must_be_trained_again_says_so():
    class Fixed(Router):
        experts = ("math",)

        def scores(self, messages_batch):
            return [{"math": 1.0} for _ in messages_batch]

    assert Fixed().with_expert(RouteOption("math", "Sums.")).experts == ("math",)
    with pytest.raises(RouterError, match=r"'law': a router of the kind Fixed must be trained again .*router train"):
        Fixed().with_expert(RouteOption("law", "Contracts."))


def test_training_starts_from_what_is_said_and_keeps_it(all_rows, encoder, options, unseen, base, tmp_path):
    rows = [row for row in all_rows[::8] if row.domain != "instruct" or row.query < "K"]  # one half of its forms
    plain = train_router(rows, tuple(SAID), encoder)
    said = train_router(rows, tuple(SAID), encoder, options=options)
    assert plain.prior is None
    assert evaluate_router(said, unseen).accuracy >= evaluate_router(plain, unseen).accuracy
    said.save(tmp_path / "router")
    loaded = load_router(tmp_path / "router", base, experts=tuple(SAID))
    query = unseen[0].query
    assert loaded.route(query).scores == pytest.approx(said.route(query).scores, abs=1e-5)
    law = RouteOption("law", "Contracts and clauses.", tuple(f"Is clause {i} of the contract void?" for i in range(5)))
    grown = add_described(loaded, [law])
    assert grown.route("Is clause 77 of the contract void?").choice == "law"
    assert grown.prior.options[-1] == law


def test_descriptions_alone_are_no_place_to_start_from(all_rows, encoder):
    bare = [RouteOption(name, said) for name, said in SAID.items()]
    assert train_router(all_rows[::16], tuple(SAID), encoder, options=bare).prior is None
    lined = [RouteOption(name, said, ("one", "two", "three")) for name, said in reversed(SAID.items())]
    with pytest.raises(RouterError, match=r"options: of sql, .* not of math"):
        train_router(all_rows[::16], tuple(SAID), encoder, options=lined)


def test_routers_of_the_versions_before_are_read(saved, base, tmp_path):
    copy = tmp_path / "router"
    shutil.copytree(saved, copy)
    data = json.loads((copy / "router.json").read_text())
    del data["settings"]["tasks"]
    (copy / "router.json").write_text(json.dumps(data | {"version": 2}))
    before = load_router(copy, base)
    assert not before.settings.tasks  # its heads learnt beside a prior without it
    del data["routes"]
    (copy / "router.json").write_text(json.dumps(data | {"version": 2}))
    with pytest.raises(RouterError, match=r"routes: missing"):
        load_router(copy, base)
    del data["settings"]["prior"], data["settings"]["own"]
    (copy / "router.json").write_text(json.dumps(data | {"version": 1}))
    first = load_router(copy, base)
    assert (first.settings.prior, first.settings.own, first.settings.tasks) == (0.0, 1.0, False)
    for router in (before, first):
        assert router.route("hello").scores == load_router(saved, base).route("hello").scores


def test_the_command_decides_over_a_family_and_over_a_file(project, family, options, tmp_path):
    done = CliRunner().invoke(app, ["route", "--family", str(project), options[3].examples[0], "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["choice"] == "sql"
    routes = [{"name": o.name, "description": o.description, "examples": list(o.examples)} for o in options]
    (tmp_path / "routes.json").write_text(json.dumps(routes))
    words = ["route", "--routes", str(tmp_path / "routes.json"), options[3].examples[0], "--json"]
    done = CliRunner().invoke(app, [*words, "--encoder", str(family / "base")])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["choice"] == "sql"
    assert "--encoder: missing" in CliRunner().invoke(app, words).stderr


def test_lines_that_were_read_once_are_kept(space, options, monkeypatch):
    DescribedRouter(options, space)
    monkeypatch.setattr(space.encoder, "encode", lambda *_: pytest.fail("read again"))
    assert torch.equal(space.lines([options[0].examples[0]])[0], space.lines([options[0].examples[0]])[0])


def test_routes_by_descriptions_alone_are_asked_of_the_encoder_as_it_comes(options, space, encoder):
    other, asked = Space(encoder), []
    decider = Decider(space, lambda: asked.append(1) or other)
    assert decider.decide("How many apples?", options).scores == pytest.approx(
        DescribedRouter(options, space).route("How many apples?").scores
    )
    assert not asked
    bare = [replace(option, examples=()) for option in options]
    for text in ("How many apples?", "Write a poem."):
        decider.decide(text, bare)
    assert asked == [1]
    assert not suits_update(bare)
    assert suits_update([*bare, options[0]])
    assert suits_update([RouteOption(f"intent {i}", "something") for i in range(16)])

"""`model: "auto"`: a trained router, and what happens when a router cannot be trusted."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from meswitch.router import Router, Rule, RulesRouter
from meswitch.server import create_app
from tests.support.http_server import QUESTIONS, ask_with, policy, serving, user


class Fragile(Router):
    """Sends all to code, unless a query says otherwise."""

    experts = ("math", "code", "gone")
    threshold = 0.5
    fallback = "base"

    def scores(self, messages_batch):
        out = []
        for messages in messages_batch:
            text = messages[-1]["content"]
            if "crash" in text:
                raise RuntimeError("the router crashed, as the test wants")
            best = "gone" if "gone" in text else "code"
            sure = 0.2 if "unsure" in text else 0.8
            out.append({name: sure if name == best else 0.1 for name in self.experts})
        return out


@pytest.fixture(scope="module")
def fragile(engine):
    with serving(create_app(engine, auto=policy(engine, Fragile(), "math"), close_engine=False)) as url:
        yield ask_with(url)


def ask(client, text, **more):
    raw = client.chat.completions.with_raw_response.create(
        model="auto", messages=user(text), **{"max_tokens": 4} | more
    )
    return raw.headers, raw.parse()


@pytest.mark.parametrize("expert", ["math", "code"])
def test_the_router_chooses_and_the_answer_says_so(client, engine, expert):
    headers, answer = ask(client, QUESTIONS[expert], max_tokens=16)
    assert answer.model == headers["x-meswitch-expert"] == expert
    assert headers["x-meswitch-route-reason"] == "scored"
    assert 0.5 < float(headers["x-meswitch-route-score"]) <= 1
    (alone,) = engine.generate([user(QUESTIONS[expert])], model=expert, max_new_tokens=16)
    assert answer.choices[0].message.content == alone.text


def test_an_unsure_router_leaves_the_answer_to_the_fallback(client):
    headers, answer = ask(client, "Good morning! What is the weather like in Lisbon?")
    assert answer.model == headers["x-meswitch-expert"] == "base"
    assert headers["x-meswitch-route-reason"] == "abstained"
    assert 0 <= float(headers["x-meswitch-route-score"]) < 1


def test_streams_and_plain_completions_are_routed_too(client):
    asked = {"model": "auto", "max_tokens": 4}
    chunks = client.chat.completions.create(**asked, messages=user(QUESTIONS["math"]), stream=True)
    assert {chunk.model for chunk in chunks} == {"math"}
    raw = client.completions.with_raw_response.create(**asked, prompt=QUESTIONS["code"])
    assert raw.parse().model == raw.headers["x-meswitch-expert"] == "code"
    for prompt in (["a", "b"], [5, 6]):
        with pytest.raises(openai.BadRequestError, match="prompt: model 'auto' takes one text"):
            client.completions.create(**asked, prompt=prompt)


def test_many_queries_at_once_are_each_routed_as_if_alone(client):
    names = ["math", "code"] * 6
    with ThreadPoolExecutor(len(names)) as pool:
        served = list(pool.map(lambda name: ask(client, QUESTIONS[name], max_tokens=1)[1].model, names))
    assert served == names


@pytest.mark.parametrize("trouble", ["crash", "gone"])
def test_a_router_that_fails_costs_nobody_an_answer(fragile, trouble):
    headers, answer = ask(fragile, f"please {trouble}")
    assert answer.model == headers["x-meswitch-expert"] == "math"
    assert headers["x-meswitch-route-reason"] == "failed"
    assert "x-meswitch-route-score" not in headers
    assert answer.choices[0].message.content


def test_a_query_that_breaks_the_router_does_not_disturb_its_neighbours(fragile):
    texts = ["crash", "fine", "unsure", "fine", "crash", "fine"]
    with ThreadPoolExecutor(len(texts)) as pool:
        served = list(pool.map(lambda text: ask(fragile, text, max_tokens=1)[1].model, texts))
    assert served == ["math", "code", "base", "code", "math", "code"]


@pytest.fixture(scope="module")
def ruled(engine):
    """Rules in front of the router that sends all to code."""
    names = ("math", "code", "gone")
    rules = [
        Rule("math", "header:X-Task", "^sums$"),
        Rule("math", "metadata:team", "finance|tax"),
        Rule("other", "header:authorization", "."),
        Rule("math", "system", "You count"),
    ]
    router = RulesRouter(rules, names, Fragile(), fallback="base")
    with serving(create_app(engine, auto=policy(engine, router), close_engine=False)) as url:
        yield ask_with(url)


def test_rules_see_headers_and_metadata_of_a_request(ruled):
    def served(**more):
        return ask(ruled, "the same question", max_tokens=1, **more)[1].model

    assert served() == "code"  # and no rule saw the key
    assert served(extra_headers={"x-task": "sums"}) == "math"
    assert served(extra_headers={"X-TASK": "poems"}) == "code"
    assert served(metadata={"team": "tax office"}) == "math"
    assert served(metadata={"team": "sales"}) == "code"
    assert served() == "code"  # what was decided for others is not remembered for this one
    plain = {"model": "auto", "max_tokens": 1, "prompt": "the same question"}
    assert ruled.completions.create(**plain, extra_body={"metadata": {"team": "tax"}}).model == "math"


def test_rules_see_the_system_prompt_of_each_request(ruled):
    talk = [{"role": "system", "content": "You count."}, *user("the same question")]
    asked = {"model": "auto", "max_tokens": 1}
    assert ruled.chat.completions.create(**asked, messages=talk[1:]).model == "code"
    assert ruled.chat.completions.create(**asked, messages=talk).model == "math"


@pytest.mark.parametrize("metadata", [{"team": "x" * 513}, {str(i): "x" for i in range(17)}, {"team": ["x"]}])
def test_metadata_of_another_form_than_openais_is_refused(ruled, metadata):
    with pytest.raises(openai.BadRequestError, match="metadata"):
        ask(ruled, "add", metadata=metadata)


def test_what_the_router_says_is_told_without_an_answer(client, url):
    def say(**body):
        return httpx.post(f"{url}/v1/route", json=body)

    for model in ("math", "code"):
        said = say(input=QUESTIONS[model]).json()
        assert (said["model"], said["reason"]) == (model, "scored")
        assert said["scores"][model] == said["score"] == max(said["scores"].values())
        assert sum(said["scores"].values()) == pytest.approx(1, abs=1e-3)
        assert say(input=[{"role": "user", "content": QUESTIONS[model]}]).json() == said
        asked = client.chat.completions.create(model="auto", messages=user(QUESTIONS[model]), max_tokens=1)
        assert asked.model == said["model"]
    assert say(input=[]).json()["error"]["param"] == "input"
    assert say(input="hello", threshold=0.5).json()["error"]["param"] == "threshold"


def test_a_request_may_bring_routes_of_its_own(url):
    counting = {"name": "counting", "examples": ["Tom has 3 apples and buys 4. How many has he?", "Add 5 and 9."]}
    letters = {"name": "letters", "description": "writing letters", "examples": ["Write to my aunt.", "A thank-you."]}

    def say(routes, **body):
        return httpx.post(f"{url}/v1/route", json={"input": "Rosa has 6 pens. How many?", "routes": routes, **body})

    said = say([counting, letters], threshold=0.0).json()
    assert said["model"] in ("counting", "letters")
    assert said["scores"].keys() == {"counting", "letters", "other"}
    assert say([counting, letters], threshold=1.0).json()["model"] == "error"
    for routes, field in (
        ([counting, counting], "counting"),
        ([{"name": "x", "color": 1}, letters], "routes[0].color"),
    ):
        refused = say(routes)
        assert refused.status_code == 400
        assert field in refused.json()["error"]["message"]

"""What the server does around the router: remembers, counts, fetches ahead, lets clients decide."""

import asyncio
import contextlib
import json
import re
import threading
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from meswitch.router import RouteOption, Router
from meswitch.server import create_app
from meswitch.server.auto import ENTRY_BYTES, AutoPolicy, RouteCache, key_of, routing_request
from tests.support.http_server import QUESTIONS, ask_with, policy, serving, user, wait_until

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "meswitch.json"


class Counting(Router):
    """Sends what says "code" to code, what says "nothing" to nobody, the rest to math."""

    experts = ("math", "code")
    threshold = 0.5

    def __init__(self, fallback="base"):
        self.fallback = fallback
        self.seen = []

    def scores(self, messages_batch):
        texts = [messages[-1]["content"] for messages in messages_batch]
        self.seen += texts
        sure = [0.3 if "nothing" in text else 0.9 for text in texts]
        return [
            {"math": 0.05 if "code" in text else p, "code": p if "code" in text else 0.05}
            for text, p in zip(texts, sure, strict=True)
        ]


@pytest.fixture
def counting():
    return Counting()


@pytest.fixture
def address(engine, counting):
    with serving(create_app(engine, auto=policy(engine, counting), close_engine=False)) as url:
        yield url


def ask(address, messages, model="auto", headers=None):
    return ask_with(address).chat.completions.with_raw_response.create(
        model=model, messages=messages, max_tokens=1, extra_headers=headers
    )


def test_a_question_that_was_asked_before_is_not_scored_again(address, counting):
    first, second = (ask(address, user("add 1 and 2")).headers for _ in range(2))
    assert counting.seen == ["add 1 and 2"]
    for name in ("x-meswitch-expert", "x-meswitch-route-score", "x-meswitch-route-reason"):
        assert first[name] == second[name]


def test_the_same_last_turn_after_another_history_is_another_question(address, counting):
    assert ask(address, user("nothing more")).headers["x-meswitch-expert"] == "base"
    talk = [*user("code, please"), {"role": "assistant", "content": "x"}, *user("nothing more")]
    assert ask(address, talk).headers["x-meswitch-expert"] == "code"


def test_metrics_count_decisions_hits_and_batches(address):
    for text in ("add", "add", "code", "nothing"):
        ask(address, user(text))
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    assert 'meswitch_route_decisions_total{expert="math",reason="scored"} 2.0' in lines
    assert 'meswitch_route_decisions_total{expert="base",reason="abstained"} 1.0' in lines
    assert "meswitch_route_cache_hits_total 1.0" in lines
    assert "meswitch_route_scored_total 3.0" in lines
    assert f"meswitch_route_cache_bytes {float(3 * ENTRY_BYTES)}" in lines


def test_a_header_decides_instead_of_the_router(address, counting):
    raw = ask(address, user("add 1 and 2"), headers={"x-meswitch-expert": "code"})
    assert (raw.headers["x-meswitch-expert"], raw.parse().model, counting.seen) == ("code", "code", [])
    with pytest.raises(openai.NotFoundError, match="model 'poetry' does not exist"):
        ask(address, user("add"), headers={"x-meswitch-expert": "poetry"})


def test_a_chosen_expert_is_brought_to_its_slot(address, engine):
    ask(address, user("code"))
    places = lambda: {row.expert: row.place for row in engine.store.residency()}  # noqa: E731
    assert wait_until(lambda: places()["code"] == "device")
    assert wait_until(lambda: all(row.pins == 0 for row in engine.store.residency()))


def test_an_abstention_can_be_an_error(engine):
    with serving(create_app(engine, auto=policy(engine, Counting("error"), "error"), close_engine=False)) as url:
        assert ask(url, user("add")).parse().model == "math"
        with pytest.raises(openai.UnprocessableEntityError, match="no expert is for this") as refused:
            ask(url, user("nothing"))
        assert refused.value.code == "no_expert"


def test_every_label_has_its_score_in_a_header(address):
    told = ask(address, user("add")).headers["x-meswitch-route-scores"]
    assert told == "math=0.9000,code=0.0500"


def test_who_left_is_not_chosen_from_memory(engine, counting):
    names = ["base", "math", "code"]
    auto = AutoPolicy(counting, lambda: names, base="base")

    async def chosen():
        return (await auto.choose("auto", routing_request(user("code"), [], None))).expert

    async def both():
        first = await chosen()
        names.remove("code")
        return first, await chosen()

    assert asyncio.run(both()) == ("code", "base")


def test_metrics_count_answers_by_expert(address, engine):
    before = metric(address, 'meswitch_requests_total{expert="math",finish_reason="length"}')
    loads = metric(address, 'meswitch_expert_requests_total{expert="math"}')
    answer = ask_with(address).completions.create(model="math", prompt="add", max_tokens=3)
    assert metric(address, 'meswitch_requests_total{expert="math",finish_reason="length"}') == before + 1
    assert metric(address, 'meswitch_expert_requests_total{expert="math"}') == loads + 1
    assert metric(address, 'meswitch_prompt_tokens_total{expert="math"}') >= answer.usage.prompt_tokens
    assert metric(address, 'meswitch_generation_tokens_total{expert="math"}') >= 3
    for name in ("time_to_first_token", "time_per_output_token", "queue", "request"):
        assert metric(address, f'meswitch_{name}_seconds_count{{expert="math"}}') >= 1
    assert metric(address, 'meswitch_expert_resident{expert="math",place="device"}') == 1
    assert metric(address, 'meswitch_memory_bytes{purpose="slots"}') == engine.store.device_bytes
    assert metric(address, 'meswitch_http_responses_total{status="200"}') >= 1
    assert metric(address, "meswitch_batch_size_count") == metric(address, "meswitch_steps_total") > 2
    assert metric(address, 'meswitch_batch_size_bucket{le="1.0"}') >= 3
    assert metric(address, "meswitch_batch_size_sum") >= metric(address, "meswitch_batch_size_count")


def test_the_dashboard_asks_for_metrics_that_there_are(address):
    for text in ("add", "code"):
        ask_with(address).completions.create(model="auto", prompt=text, max_tokens=3)
    board = json.loads(DASHBOARD.read_text())
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    there = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    targets = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(targets) > 15
    for expression in targets:
        names = re.findall(r"meswitch_\w+", expression)
        assert names
        assert set(names) <= there.keys(), expression
        labels = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        assert labels <= set().union(*(there[name] for name in names)), expression
        assert expression.count("(") == expression.count(")")


def metric(address, name):
    """The value of one line, 0 where it is not there."""
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)  # as Prometheus reads it
    samples = [sample for family in families for sample in family.samples]
    assert samples
    for sample in samples:
        labels = ",".join(f'{label}="{value}"' for label, value in sample.labels.items())
        if name == (f"{sample.name}{{{labels}}}" if labels else sample.name):
            return sample.value
    return 0


def test_a_switch_reads_the_history_again_with_the_new_experts_template(client, engine):
    talk = user(QUESTIONS["math"])
    first = client.chat.completions.create(model="auto", messages=talk, max_tokens=8)
    assert first.model == "math"
    talk += [{"role": "assistant", "content": first.choices[0].message.content}, *user(QUESTIONS["code"])]
    second = client.chat.completions.create(model="auto", messages=talk, max_tokens=8)
    assert second.model == "code"
    (alone,) = engine.generate([talk], model="code", max_new_tokens=8)
    assert second.choices[0].message.content == alone.text
    assert second.usage.prompt_tokens == len(engine.tokenizers["code"].encode(talk))


def test_thanks_stays_with_whoever_answered(client):
    talk = [*user(QUESTIONS["math"]), {"role": "assistant", "content": "2"}, *user("thanks, great!")]
    raw = client.chat.completions.with_raw_response.create(model="auto", messages=talk, max_tokens=1)
    assert (raw.headers["x-meswitch-expert"], raw.headers["x-meswitch-route-reason"]) == ("math", "kept")


def test_the_cache_forgets_the_least_recently_used_beyond_its_bytes():
    cache = RouteCache(3 * ENTRY_BYTES)
    keys = [key_of([str(i)]) for i in range(4)]
    for i in range(3):
        cache.put(keys[i], i)
    assert cache.get(keys[0]) == 0
    cache.put(keys[3], 3)
    assert (cache.get(keys[1]), cache.get(keys[0]), cache.nbytes) == (None, 0, 3 * ENTRY_BYTES)


def test_texts_that_join_to_the_same_are_not_the_same_conversation():
    assert key_of(["ab", "c"]) != key_of(["a", "bc"]) != key_of(["abc"])


def test_experts_that_come_at_once_are_all_learned():
    both = threading.Barrier(2)

    class Growing(Counting):
        def with_expert(self, option):
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)  # both have read the router now, if they may
            made = Growing()
            made.experts = (*self.experts, option.name)
            return made

    auto = AutoPolicy(Growing(), lambda: (), base="base")
    coming = [threading.Thread(target=auto.learn, args=(RouteOption(name, "sums"),)) for name in ("sql", "law")]
    for one in coming:
        one.start()
    for one in coming:
        one.join()
    assert sorted(auto.experts) == ["code", "law", "math", "sql"]

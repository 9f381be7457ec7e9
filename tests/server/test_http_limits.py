"""Full queues, clients that go away, dead engines, keys, health: the server under bad weather."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest

from meswitch import Engine
from meswitch.server import create_app
from tests.support.http_server import ask_with, is_idle, serving, user, wait_until

LONG = {"model": "base", "prompt": "The sea", "max_tokens": 400, "temperature": 1.0, "seed": 1}


@pytest.fixture
def small(family):
    """An engine of its own, for tests that fill or break it: two requests and no more."""
    with Engine(family / "base", {}, max_queue=2) as engine:
        yield engine


def test_models_are_listed_with_what_they_are_for(client):
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["base", "math", "code", "auto"]
    assert (cards["math"].kind, cards["math"].parent) == ("expert", "base")
    assert cards["math"].description == "all about math"
    assert client.models.retrieve("code").description == "all about code"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


def test_health_counts_requests(url, client, engine):
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "waiting": 0, "running": 0, "auto": True}
    with client.completions.create(**LONG, stream=True) as stream:
        next(iter(stream))
        assert httpx.get(f"{url}/health").json()["running"] == 1
    assert wait_until(lambda: is_idle(engine))


def test_a_full_queue_asks_to_come_again(small):
    with serving(create_app(small, close_engine=False)) as url:
        client = ask_with(url)
        with client.completions.create(**LONG, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError, match="queue is full") as caught:
                client.completions.create(model="base", prompt="a", max_tokens=1, n=2)  # one fits, two do not
            assert caught.value.response.headers["retry-after"] == "1"
            assert caught.value.code == "queue_full"
            assert wait_until(lambda: small.load() == {"waiting": 0, "running": 1})  # the one was taken back
            assert client.completions.create(model="base", prompt="a", max_tokens=1).choices
        assert wait_until(lambda: is_idle(small))
        with pytest.raises(openai.BadRequestError, match="n: 3 answers in one request, the queue holds 2"):
            client.completions.create(model="base", prompt="a", max_tokens=1, n=3)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_client_that_leaves_a_stream_frees_the_engine(url, engine, path):
    body = {"model": "base", "max_tokens": 1500, "temperature": 1.0, "seed": 1, "n": 3, "stream": True}
    body |= {"messages": user("The sea")} if path.startswith("chat") else {"prompt": "The sea"}
    with httpx.stream("POST", f"{url}/v1/{path}", json=body, timeout=20) as response:
        lines = response.iter_lines()  # kept: httpx closes the connection with it
        next(lines)
        assert engine.load()["running"] > 0
    assert wait_until(lambda: is_idle(engine))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_any_answer_frees_the_engine(url, engine, stream):
    body = json.dumps(LONG | {"n": 4, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    address = url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        assert wait_until(lambda: sum(engine.load().values()) > 0)
    assert wait_until(lambda: is_idle(engine), seconds=5)


def test_an_engine_that_dies_gives_503_everywhere(small):
    with serving(create_app(small, close_engine=False)) as url:
        client = ask_with(url)
        steps = iter(range(5))

        def fail_after_a_while(*_):
            if next(steps, None) is None:
                raise RuntimeError("out of memory, as the test wants")

        small.model.register_forward_pre_hook(fail_after_a_while)
        stream = client.completions.create(**LONG, stream=True)
        assert next(stream).choices
        with pytest.raises(openai.APIError, match="out of memory"):  # the status is out: an error event
            list(stream)
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503
        assert "out of memory" in health.json()["reason"]
        with pytest.raises(openai.InternalServerError, match="out of memory") as caught:
            client.chat.completions.create(model="base", messages=user("hello"))
        assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")


def test_an_engine_that_dies_before_the_first_piece_of_a_stream_gives_the_status(small):
    with serving(create_app(small, close_engine=False)) as url:

        def fail(*_):
            raise RuntimeError("out of memory, as the test wants")

        small.model.register_forward_pre_hook(fail)
        for stream in (True, False):
            with pytest.raises(openai.InternalServerError, match="out of memory") as caught:
                ask_with(url).completions.create(**LONG, stream=stream)
            assert caught.value.status_code == 503


def test_a_key_is_asked_for_if_the_environment_has_one(engine, monkeypatch):
    monkeypatch.setenv("MESWITCH_API_KEY", "open sesame")
    with serving(create_app(engine, close_engine=False)) as url:
        for wrong in ("open", "open sesame!", "ünïcode"):
            answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {wrong}".encode()})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            ask_with(url, "guess").chat.completions.create(model="math", messages=user("hello"))
        assert httpx.post(f"{url}/v1/completions", content=b"not json").status_code == 401
        assert ask_with(url, "open sesame").models.list().data
        assert httpx.get(f"{url}/health").status_code == 200


def test_without_a_router_only_auto_fails_and_says_what_to_do(engine):
    with serving(create_app(engine, close_engine=False)) as url:
        client = ask_with(url)
        assert [card.id for card in client.models.list()] == ["base", "math", "code"]
        with pytest.raises(openai.NotFoundError, match="meswitch router train") as caught:
            client.chat.completions.create(model="auto", messages=user("hello"))
        assert caught.value.code == "model_not_found"
        assert client.chat.completions.create(model="math", messages=user("hello"), max_tokens=1).choices


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": "math"', "not valid JSON"),
        (b'{"model": "math", "seed": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b'{"model": ' + b"[" * 100_000, "not valid JSON: maximum recursion depth"),
        ('{"model": "déjà"}'.encode("latin-1"), "not valid JSON: 'utf-8' codec can't decode byte 0xe9"),
        (b"[1, 2]", "must be a JSON object"),
        (b"", "must be a JSON object"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "model: this field is required"),
        (b'{"model": "math", "messages": null}', "messages: this field is required"),
        (b'{"model": "math", "messages": [{"role": "user", "content": "a"}], "top_p": NaN}', "top_p: "),
        (b'{"model": "math", "messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0].content: "),
        (b'{"model": "math", "messages": [{"role": "user", "content": "a"}], "stop": "\\ud800"}', "stop[0]: "),
    ],
)
def test_a_body_that_is_not_a_request_gets_an_openai_error(url, content, message):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [b'"\\ud800"', b'["a", "\\ud800"]'])
def test_a_prompt_with_half_a_surrogate_pair_is_refused_by_its_own_name(url, prompt):
    content = b'{"model": "math", "prompt": ' + prompt + b"}"
    answer = httpx.post(f"{url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


def test_unknown_paths_and_methods_get_openai_errors(url):
    for answer, status in ((httpx.get(f"{url}/v1/nothing"), 404), (httpx.get(f"{url}/v1/completions"), 405)):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_server_lets_running_answers_finish_and_closes_its_engine(family):
    engine = Engine(family / "base", {})
    answers = []
    with serving(create_app(engine)) as url:
        client = ask_with(url)
        asked = {**LONG, "max_tokens": 60}
        thread = threading.Thread(target=lambda: answers.append(client.completions.create(**asked)))
        thread.start()
        assert wait_until(lambda: engine.load()["running"] == 1)
        time.sleep(0.05)
    thread.join()
    assert answers[0].choices[0].finish_reason in ("length", "stop")
    with pytest.raises(Exception, match="closed"):
        engine.submit("a")


def test_stop_texts_are_bounded(url):
    body = {"model": "math", "prompt": "a", "max_tokens": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body | {"stop": "x" * 1025})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stop[0]"
    assert httpx.post(f"{url}/v1/completions", json=body | {"stop": "x" * 1024}).status_code == 200


def test_a_body_whose_length_is_not_said_is_read_up_to_the_limit(url):
    def pieces():
        for _ in range(9):
            yield b" " * (1 << 20)

    answer = httpx.post(f"{url}/v1/completions", content=pieces(), timeout=30)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(url, engine, monkeypatch, field):
    monkeypatch.setattr(engine.tokenizers["math"], "encode", None)
    text = "word " * 1_000_000
    path, body = ("completions", text) if field == "prompt" else ("chat/completions", user(text))
    answer = httpx.post(f"{url}/v1/{path}", json={"model": "math", field: body}, timeout=30)
    assert answer.status_code == 400
    assert "at least" in answer.json()["error"]["message"]


def test_streams_and_health_go_on_while_a_prompt_is_encoded(url, client, engine, monkeypatch):
    encode, begun, go_on = engine.tokenizers["code"].encode, threading.Event(), threading.Event()

    def slowly(prompt):
        begun.set()
        assert go_on.wait(20)
        return encode(prompt)

    monkeypatch.setattr(engine.tokenizers["code"], "encode", slowly)
    found = []
    ask = threading.Thread(
        target=lambda: found.append(client.completions.create(model="code", prompt="a", max_tokens=2))
    )
    ask.start()
    assert begun.wait(10)
    assert httpx.get(f"{url}/health", timeout=10).json()["status"] == "ok"
    assert client.completions.create(model="math", prompt="a", max_tokens=2).usage.completion_tokens == 2
    go_on.set()
    ask.join(20)
    assert found[0].usage.completion_tokens == 2


def test_a_client_that_leaves_while_its_prompt_is_encoded_leaves_nothing_behind(url, engine, monkeypatch):
    encode, go_on = engine.tokenizers["code"].encode, threading.Event()
    monkeypatch.setattr(engine.tokenizers["code"], "encode", lambda prompt: go_on.wait(20) and encode(prompt))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=LONG | {"model": "code"}, timeout=0.5)
    go_on.set()
    assert wait_until(lambda: is_idle(engine))

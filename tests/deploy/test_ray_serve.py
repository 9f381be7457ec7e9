"""Two replicas on a local Ray, asked by a real client."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from meswitch import Family
from meswitch.launch import engine_from_family
from meswitch.router import Encoder, Row, train_router

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray", reason="make test-ray")
serve = pytest.importorskip("ray.serve", reason="make test-ray")

EXPERTS = ("math", "code")
QUESTIONS = {
    "math": "Ravi shares 8 books equally among 4 friends. How many books does each friend get?",
    "code": "Write a Python function that returns the sum of a list.",
    "base": "Tell me about the sea.",
}
PORT = 8765


@pytest.fixture(scope="module")
def family_file(family, deltas, tmp_path_factory):
    directory = tmp_path_factory.mktemp("family")
    rows = [json.loads(line) for line in (family / "routing.jsonl").read_text().splitlines()]
    rows = [Row(row["query"], row["domain"]) for row in rows if row["domain"] in EXPERTS][:120]
    train_router(rows, EXPERTS, Encoder.load(family / "base")).save(directory / "router")
    text = f'[base]\npath = "{family / "base"}"\n[engine]\nslots = 1\n'
    for name in EXPERTS:
        text += f'[[expert]]\nname = "{name}"\ndelta = "{deltas[name]}"\n'
    (directory / "family.toml").write_text(text)
    return directory / "family.toml"


@pytest.fixture(scope="module")
def alone(family_file):
    """What one engine answers to each question."""
    with engine_from_family(Family.load(family_file)) as engine:
        prompts = [[{"role": "user", "content": text}] for text in QUESTIONS.values()]
        answers = engine.generate(prompts, model=list(QUESTIONS), max_new_tokens=40)
        return dict(zip(QUESTIONS, (answer.text for answer in answers), strict=True))


@pytest.fixture(scope="module")
def client(family_file):
    from meswitch.deploy.ray_app import Arguments, build

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(build(Arguments(family=family_file, replicas=2, cpus=0.5)), name="meswitch", route_prefix="/")
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="unused", max_retries=0, timeout=120)
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(client, model, question, **more):
    """Text, and the headers."""
    messages = [{"role": "user", "content": question}]
    found = client.chat.completions.with_raw_response.create(
        model=model, messages=messages, max_tokens=40, temperature=0, **more
    )
    return found.parse().choices[0].message.content, found.headers


def test_every_expert_answers_as_one_engine_does_whole_and_streamed(client, alone):
    with ThreadPoolExecutor(12) as pool:
        asked = [(name, pool.submit(ask, client, name, text)) for name, text in QUESTIONS.items() for _ in range(4)]
        assert [(name, answer.result()[0]) for name, answer in asked] == [(name, alone[name]) for name, _ in asked]
    messages = [{"role": "user", "content": QUESTIONS["code"]}]
    stream = client.chat.completions.create(model="code", messages=messages, max_tokens=40, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == alone["code"]
    assert len(pieces) > 3


def test_an_experts_requests_go_where_it_is_resident(client):
    ask(client, "math", "1 + 1?")
    time.sleep(3)  # until its replica has told
    assert len({ask(client, "math", f"{i} + 1?")[1]["x-meswitch-replica"] for i in range(6)}) == 1


def test_auto_is_routed_first_and_then_placed(client, alone):
    text, headers = ask(client, "auto", QUESTIONS["math"])
    assert (text, headers["x-meswitch-expert"]) == (alone["math"], "math")
    assert headers["x-meswitch-route-reason"] == "scored"
    assert 0.5 < float(headers["x-meswitch-route-score"]) <= 1
    assert headers["x-meswitch-replica"] == ask(client, "math", "2 + 2?")[1]["x-meswitch-replica"]


def test_auto_is_answered_as_by_one_server(client, alone):
    text, headers = ask(client, "auto", QUESTIONS["code"], extra_headers={"x-meswitch-expert": "code"})
    assert (text, headers["x-meswitch-expert"]) == (alone["code"], "code")
    assert "x-meswitch-route-reason" not in headers
    with pytest.raises(openai.NotFoundError, match="'poetry' does not exist; there are base, math, code, auto"):
        ask(client, "auto", "Roses", extra_headers={"x-meswitch-expert": "poetry"})
    with pytest.raises(openai.BadRequestError, match="takes one text a request"):
        client.completions.create(model="auto", prompt=["a", "b"])


def test_bad_requests_are_refused_as_by_one_server(client):
    with pytest.raises(openai.NotFoundError, match="'poetry' does not exist; there are base, math, code"):
        ask(client, "poetry", "Roses")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="math", messages=[{"role": "user", "content": "x"}], max_tokens=-1)
    assert [model.id for model in client.models.list()] == ["base", "math", "code", "auto"]


def test_all_protocols_are_answered(client, alone):
    made = client.responses.create(model="auto", input=QUESTIONS["math"], max_output_tokens=40)
    assert (made.output_text, made.model) == (alone["math"], "math")
    body = {"model": "code", "max_tokens": 40, "messages": [{"role": "user", "content": QUESTIONS["code"]}]}
    for model in ("code", "auto"):
        said = client.post("/messages", body=body | {"model": model}, cast_to=object)
        assert (said["content"][0]["text"], said["model"]) == (alone["code"], "code")
    with pytest.raises(openai.NotFoundError) as caught:
        client.post("/messages", body=body | {"model": "poetry"}, cast_to=object)
    assert caught.value.body["type"] == "not_found_error"  # in the protocol's own form


def test_experts_are_listed_and_cannot_be_changed(client):
    rows = client.get("/experts", cast_to=object)["data"]
    assert [row["id"] for row in rows] == list(EXPERTS)
    for path in ("/experts", "/experts/math/pin", "/load_lora_adapter"):
        with pytest.raises(openai.InternalServerError, match=r"those of family\.toml") as caught:
            client.post(path, body={"name": "x", "path": "y"}, cast_to=object)
        assert (caught.value.status_code, caught.value.code) == (501, "not_supported")


def test_a_lost_replica_loses_no_request_that_has_not_begun_to_answer(client, alone):
    name = ask(client, "math", "3 + 3?")[1]["x-meswitch-replica"]
    actors = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["name"].endswith(name)]
    assert len(actors) == 1
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(ask, client, "math", QUESTIONS["math"]) for _ in range(24)]
        time.sleep(0.15)
        ray.kill(ray.get_actor(actors[0]["name"], namespace=actors[0]["namespace"]))
        assert {answer.result()[0] for answer in answers} == {alone["math"]}
        assert {answer.result()[1]["x-meswitch-replica"] for answer in answers} != {name}

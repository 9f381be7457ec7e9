"""Every request has an id, a line of the log, and no message with a path of the machine."""

import json
import logging

import httpx
import pytest

from meswitch import Engine
from meswitch.server import create_app
from meswitch.server.errors import without_paths
from meswitch.server.logs import JsonFormatter
from tests.support.http_server import ask_with, serving, user, wait_until

SECRET = "/srv/models/secret-7b/delta.safetensors"


@pytest.fixture
def url(engine):
    app = create_app(engine, close_engine=False)

    @app.get("/v1/boom")
    async def boom():
        raise FileNotFoundError(2, "No such file or directory", SECRET)

    with serving(app) as url:
        yield url


def test_an_error_that_nobody_expected_is_logged_under_the_id_that_the_client_has(url, caplog):
    answer = httpx.get(f"{url}/v1/boom")
    name = answer.headers["x-request-id"]
    assert answer.status_code == 500
    assert name in answer.json()["error"]["message"]
    assert SECRET not in answer.text
    (logged,) = [record for record in caplog.records if record.exc_info]
    assert name in logged.getMessage()
    line = json.loads(JsonFormatter().format(logged))
    assert SECRET in line["trace"]
    assert (line["level"], line["logger"]) == ("error", "meswitch.requests")


@pytest.mark.parametrize(("given", "kept"), [("abc-1:2.x_", True), ("a b", False), ("x" * 65, False), ("", False)])
def test_a_clients_own_id_is_kept_if_it_can_be_logged(url, given, kept):
    found = httpx.get(f"{url}/health", headers={"x-request-id": given}).headers["x-request-id"]
    assert (found == given) == kept
    assert kept or found.startswith("req-")


def test_two_requests_with_one_id_are_two_lines(url, caplog):
    caplog.set_level(logging.INFO, "meswitch.requests")
    client = ask_with(url)
    for tokens in (2, 3):
        client.chat.completions.create(
            model="math", messages=user("a"), max_tokens=tokens, extra_headers={"x-request-id": "same"}
        )

    def lines():
        return [record.fields for record in caplog.records if getattr(record, "fields", {}).get("request_id") == "same"]

    assert wait_until(lambda: len(lines()) == 2)  # a line is written when its answer has been sent
    assert [(line["expert"], line["status"], line["completion_tokens"]) for line in lines()] == [
        ("math", 200, 2),
        ("math", 200, 3),
    ]


def test_a_step_that_names_a_file_does_not_tell_clients(family):
    with Engine(family / "base", {}, device="cpu") as engine, serving(create_app(engine, close_engine=False)) as url:

        def fail(*_):
            raise OSError(2, "No such file or directory", SECRET)

        engine.model.register_forward_pre_hook(fail)
        answer = httpx.post(f"{url}/v1/completions", json={"model": "base", "prompt": "a"}, timeout=30)
        assert answer.status_code == 503
        assert "No such file" in answer.text
        for text in (answer.text, httpx.get(f"{url}/health").text):
            assert "secret" not in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{SECRET}: gone", "(a file of the server): gone"),
        (f"[Errno 2] No such file: '{SECRET}'", "[Errno 2] No such file: '(a file of the server)'"),
        ("8/4 = 2, and/or, 1/2/3", "8/4 = 2, and/or, 1/2/3"),
        ("POST /v1/chat/completions", "POST /v1/chat/completions"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
    ],
)
def test_paths_are_taken_out_and_nothing_else(text, told):
    assert without_paths(text) == told

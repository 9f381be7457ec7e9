"""What browsers, load balancers and clients with odd base addresses send, and histories that are sent back."""

import gzip
import json
import zlib

import httpx
import pytest

from meswitch.server import Web, create_app
from meswitch.server.keys import ApiKey, Keys
from meswitch.server.middleware import MAX_BODY
from tests.support.http_server import serving, user

ORIGIN = "https://chat.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
BODY = {"model": "math", "messages": user("How many?"), "max_tokens": 2}


@pytest.fixture(scope="module")
def open_url(engine):
    """A server with a key, whose answers pages of one other site may read."""
    app = create_app(engine, keys=Keys([ApiKey.of("one", "secret")]), web=Web([ORIGIN]), close_engine=False)
    with serving(app) as url:
        yield url


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "//v1/completions/"])
def test_a_browser_may_ask_where_its_site_is_allowed(open_url, path):
    answer = httpx.options(open_url + path, headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    asked = httpx.post(
        f"{open_url}/v1/chat/completions", json=BODY, headers={"Origin": ORIGIN, "Authorization": "Bearer secret"}
    )
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert "x-meswitch-expert" in asked.headers["access-control-expose-headers"]


def test_an_error_can_be_read_by_the_page_too(open_url):
    answer = httpx.get(f"{open_url}/v1/models", headers={"Origin": ORIGIN})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == ORIGIN


def test_other_sites_are_not_allowed(open_url, url):
    answer = httpx.options(f"{open_url}/v1/models", headers=PREFLIGHT | {"Origin": "https://evil.example"})
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers
    closed = httpx.options(f"{url}/v1/chat/completions", headers=PREFLIGHT)
    assert closed.status_code == 405
    assert "server.allow_origins" in closed.json()["error"]["message"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "  Bearer "])
def test_the_key_is_asked_for_by_bearer_in_any_case(open_url, scheme):
    headers = {"Authorization": f"{scheme} secret".strip()}
    assert httpx.get(f"{open_url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("value", ["Basic secret", "secret", "Bearer", "Bearer Secret", "Bearer secret x", ""])
def test_nothing_else_is_a_key(open_url, value):
    assert httpx.get(f"{open_url}/v1/models", headers={"Authorization": value}).status_code == 401


@pytest.mark.parametrize("path", ["/v1/models/", "/v1//models", "//v1/models", "/v1/models/math/", "/health/"])
def test_slashes_too_many_are_tolerated(url, path):
    single = httpx.get(f"{url}/{'/'.join(part for part in path.split('/') if part)}")
    answer = httpx.get(url + path)
    assert (answer.status_code, answer.json()) == (200, single.json())


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/v1//chat/completions", "/v1/chat//completions//"])
def test_requests_are_not_redirected(url, path):
    assert httpx.post(url + path, json=BODY).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/math", "/metrics", "/v1/nothing", "/"])
def test_head_is_get_without_the_body(url, path):
    head, get = httpx.head(url + path), httpx.get(url + path)
    assert head.status_code == get.status_code
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.content == b""


def test_a_path_outside_the_api_says_where_it_is(url):
    message = httpx.post(f"{url}/chat/completions", json=BODY).json()["error"]["message"]
    assert message == "POST /chat/completions: Not Found; the API is under /v1"


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_be_packed(url, encoding, pack, chunked):
    data = pack(json.dumps(BODY).encode())
    content = iter([data[:7], data[7:]]) if chunked else data
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 200
    assert answer.json()["model"] == "math"


@pytest.mark.parametrize(
    ("encoding", "data", "status", "message"),
    [
        ("gzip", b"{}", 400, "the body is not gzip"),
        ("gzip", gzip.compress(b"x" * 999, mtime=0)[:-9], 400, "the body is not whole gzip data"),
        ("br", b"{}", 415, "Content-Encoding: 'br' is not read"),
        ("gzip", gzip.compress(b" " * (MAX_BODY + 1), mtime=0), 413, "the body is larger than 8 MiB"),
    ],
)
def test_a_body_that_cannot_be_unpacked_is_refused_by_its_cause(url, encoding, data, status, message):
    answer = httpx.post(f"{url}/v1/completions", content=data, headers={"Content-Encoding": encoding}, timeout=30)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASSISTANT = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    "turn",
    [
        ASSISTANT | {"tool_calls": [], "function_call": None, "refusal": None, "annotations": [], "audio": None},
        ASSISTANT | {"reasoning_content": None, "reasoning": "", "name": "math"},
        ASSISTANT | {"reasoning_details": [], "thinking_blocks": [], "images": [], "prefix": False},
        ASSISTANT | {"reasoning_content": "hm", "prefix": None},
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "4", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_histories_may_be_sent_back_as_they_came(url, turn):
    body = BODY | {"messages": [*user("2 + 2?"), turn, *user("And 3?")]}
    assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        (ASSISTANT | {"tool_calls": [{"id": "a", "type": "function"}]}, "messages[1].tool_calls[0].function"),
        (ASSISTANT | {"tool_calls": [CALL | {"function": {"name": "f"}}]}, "messages[1].tool_calls"),  # not shown
        (
            ASSISTANT | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": "[]"}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"role": "user", "content": "4", "tool_calls": [CALL]}, "messages[1].tool_calls"),
        ({"role": "user", "content": "4", "reasoning_content": "hm"}, "messages[1].reasoning_content"),
        ({"role": "user", "content": "4", "tool_call_id": "a"}, "messages[1].tool_call_id"),
        (ASSISTANT | {"annotations": [{"type": "url"}]}, "messages[1].annotations"),
        ({"role": "user", "content": "4", "prefix": True}, "continue_final_message"),
        ({"role": "tool", "content": "4", "tool_call_id": "a"}, "messages[1]"),  # this template shows none
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "assistant"}, "messages[1].content"),
        ({"role": "user", "content": ["a"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"text": "a"}]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "bold": True}]}, "messages[1].content[0].bold"),
    ],
)
def test_what_asks_for_something_is_refused_by_field(url, turn, param):
    answer = httpx.post(f"{url}/v1/chat/completions", json=BODY | {"messages": [*user("a"), turn]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_image", "image_url": "https://x.example/a.png"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "https://x.example/a.mp4"}},
        {"type": "file", "file": {"file_id": "a"}},
    ],
)
def test_images_sound_and_files_are_refused_by_name(url, part):
    content = [{"type": "text", "text": "What is this?"}, part]
    answer = httpx.post(f"{url}/v1/chat/completions", json=BODY | {"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "messages[0].content[1]"
    assert f"'{part['type']}' is not supported: the experts read text only" in error["message"]


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"n": 1, "logprobs": False, "top_logprobs": 0, "best_of": 1, "echo": False},
        {"user": "a", "metadata": {"a": "b"}, "store": True, "keep_alive": "5m", "service_tier": "auto"},
        {"chat_template_kwargs": {}, "add_generation_prompt": True, "continue_final_message": False},
        {"skip_special_tokens": True, "ignore_eos": False, "stop_token_ids": [], "stop": [], "min_tokens": 0},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0, "logit_bias": {}},
        dict.fromkeys(["response_format", "seed", "tools", "stream_options", "logit_bias", "anything"]),
    ],
)
def test_values_that_ask_for_nothing_pass(url, neutral):
    assert httpx.post(f"{url}/v1/chat/completions", json=BODY | neutral).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools[0].function", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("ignore_eos", "yes"),
        ("skip_special_tokens", False),
        ("continue_final_message", True),
        ("reasoning_effort", "high"),
    ],
)
def test_values_that_ask_for_something_are_refused_by_field(url, field, value):
    answer = httpx.post(f"{url}/v1/chat/completions", json=BODY | {field.partition("[")[0]: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)

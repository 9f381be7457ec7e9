"""The middleware that lets vLLM's server answer as our own, before an application that says what vLLM says."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from meswitch.vllm.conformance import Conformance

TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}]
CHOICE = {"structured_outputs": {"choice": ["a"]}}
DEEP = b"[" * 200_000


async def chat(request: Request) -> JSONResponse:
    if (await request.body()).startswith(DEEP):
        return JSONResponse({"detail": "There was an error parsing the body"}, 400)
    return JSONResponse({"body": await request.json(), "id": request.headers.get("x-request-id")})


async def tokenize(request: Request) -> JSONResponse:
    error = {"message": "Field required", "type": "Bad Request", "param": "body.prompt", "code": 400}
    return JSONResponse({"error": error}, 400, {"x-request-id": "kept"})


async def unknown(request: Request) -> JSONResponse:
    error = {"message": "The model `x` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}
    return JSONResponse({"error": error}, 404)


async def odd(request: Request) -> StreamingResponse:
    async def parts():
        yield b'{"error": "Unautho'
        yield b'rized"}'

    return StreamingResponse(parts(), 401, media_type="application/json")


@pytest.fixture(scope="module")
def app():
    routes = {"/v1/chat/completions": chat, "/tokenize": tokenize, "/odd": odd}
    routes |= dict.fromkeys(("/v1/completions", "/v1/messages"), unknown)
    made = Starlette(routes=[Route(path, handler, methods=["POST"]) for path, handler in routes.items()])
    made.add_middleware(Conformance)
    return made


def send(app, path, body=None, **headers):
    given = {"content": body} if isinstance(body, bytes) else {"json": body or {}}

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post(path, **given, headers=headers)

    return asyncio.run(ask())


def test_an_error_names_the_field_and_has_the_protocols_type(app):
    answer = send(app, "/tokenize")
    assert (answer.status_code, answer.headers["x-request-id"]) == (400, "kept")
    wanted = {"message": "Field required", "type": "invalid_request_error", "param": "prompt", "code": None}
    assert answer.json() == {"error": wanted}


def test_a_model_that_there_is_not_has_the_code_that_clients_know(app):
    error = send(app, "/v1/completions").json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_an_error_of_anthropics_protocol_has_its_form(app):
    answer = send(app, "/v1/messages")
    error = {"type": "not_found_error", "message": "The model `x` does not exist."}
    assert (answer.status_code, answer.json()) == (404, {"type": "error", "error": error})


def test_an_error_of_another_form_stays(app):
    answer = send(app, "/odd")
    assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})


@pytest.mark.parametrize(("given", "taken"), [("abc-1", "abc-1"), ("a b", None), ("a" * 65, None)])
def test_an_id_that_is_none_is_left_to_the_server(app, given, taken):
    assert send(app, "/v1/chat/completions", **{"X-Request-Id": given}).json()["id"] == taken


def test_what_vllm_would_leave_out_is_refused(app):
    answer = send(app, "/v1/chat/completions", {"tools": TOOLS} | CHOICE)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "structured_outputs")
    assert error["message"].startswith("structured_outputs: not together with tools")


@pytest.mark.parametrize("body", [{"tools": TOOLS}, CHOICE, {"tools": TOOLS, "tool_choice": "none"} | CHOICE, [1]])
def test_other_requests_go_through_as_they_are(app, body):
    assert send(app, "/v1/chat/completions", body).json()["body"] == body


def test_a_body_that_nests_too_deep_is_left_to_the_server(app):
    assert send(app, "/v1/chat/completions", DEEP).status_code == 400

"""The middleware that answers `auto` in vLLM's server, before an application that says what reached it."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from meswitch.router import Rule, RulesRouter
from meswitch.vllm.command import FAMILY_VARIABLE
from meswitch.vllm.middleware import AutoRouting

RULES = [Rule("math", "header:x-task", "^sums$"), Rule("math", "metadata:team", "tax"), Rule("code", "text", "def ")]
DEEP = b"[" * 200_000


async def echo(request: Request) -> JSONResponse:
    if (await request.body()).startswith(DEEP):
        return JSONResponse("not JSON", 400)
    return JSONResponse((await request.json())["model"])


@pytest.fixture
def server(family, tmp_path, monkeypatch, request):
    """A family whose router is rules alone; its fallback is the parameter."""
    fallback = getattr(request, "param", "base")
    if fallback != "no router":
        RulesRouter(RULES, ("math", "code")).save(tmp_path / "router")
    else:
        fallback = "base"
    text = f'[base]\npath = "{family / "base"}"\n[router]\npath = "router"\nfallback = "{fallback}"\n'
    text += "".join(f'[[expert]]\nname = "{name}"\ndelta = "{name}"\n' for name in ("math", "code"))
    (tmp_path / "family.toml").write_text(text)
    monkeypatch.setenv(FAMILY_VARIABLE, str(tmp_path / "family.toml"))
    app = AutoRouting(Starlette(routes=[Route("/v1/chat/completions", echo, methods=["POST"])]))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


async def served(server, headers=None, text="hello", **more):
    body = {"model": "auto", "messages": [{"role": "user", "content": text}], **more}
    answer = await server.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.headers["x-meswitch-expert"] == answer.json()
    return answer.json()


def test_rules_see_headers_metadata_and_text(server):
    async def ask():
        return [
            await served(server),
            await served(server, {"X-Task": "sums"}),
            await served(server, metadata={"team": "tax office"}),
            await served(server, text="def double(x):"),
        ]

    assert asyncio.run(ask()) == ["base", "math", "math", "code"]


def refused(server, body, headers=None):
    answer = asyncio.run(server.post("/v1/chat/completions", json={"model": "auto"} | body, headers=headers))
    return answer.status_code, answer.json()["error"]["code"]


HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def test_the_header_decides_as_in_our_own_server(server):
    assert asyncio.run(served(server, {"x-meswitch-expert": "code"})) == "code"
    assert refused(server, HELLO, {"x-meswitch-expert": "poetry"}) == (404, "model_not_found")


def test_what_the_router_cannot_read_is_refused(server):
    assert refused(server, {"messages": "hello"}) == (400, "invalid_value")
    assert refused(server, {"prompt": ["a", "b"]}) == (400, "invalid_value")


@pytest.mark.parametrize("server", ["error"], indirect=True)
def test_an_abstention_can_be_an_error(server):
    assert refused(server, HELLO) == (422, "no_expert")


@pytest.mark.parametrize("server", ["no router"], indirect=True)
def test_without_a_router_auto_alone_fails(server, tmp_path):
    assert refused(server, HELLO) == (404, "model_not_found")
    by_name = asyncio.run(server.post("/v1/chat/completions", json={"model": "math"} | HELLO))
    assert by_name.json() == "math"


def test_a_body_that_nests_too_deep_is_left_to_the_server(server):
    assert asyncio.run(server.post("/v1/chat/completions", content=DEEP)).status_code == 400

"""The middleware that answers `auto` in vLLM's server, before an application that says what reached it."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from meswitch.router import Rule, RulesRouter
from meswitch.vllm.auto import AutoRouting
from meswitch.vllm.command import FAMILY_VARIABLE

RULES = [Rule("math", "header:x-task", "^sums$"), Rule("math", "metadata:team", "tax"), Rule("code", "text", "def ")]


async def echo(request: Request) -> JSONResponse:
    return JSONResponse((await request.json())["model"])


@pytest.fixture
def server(family, tmp_path, monkeypatch):
    """A family whose router is rules alone."""
    RulesRouter(RULES, ("math", "code")).save(tmp_path / "router")
    text = f'[base]\npath = "{family / "base"}"\n[router]\npath = "router"\nfallback = "base"\n'
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
    import asyncio

    async def ask():
        return [
            await served(server),
            await served(server, {"X-Task": "sums"}),
            await served(server, metadata={"team": "tax office"}),
            await served(server, text="def double(x):"),
        ]

    assert asyncio.run(ask()) == ["base", "math", "math", "code"]

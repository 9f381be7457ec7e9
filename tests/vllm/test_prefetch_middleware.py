"""The middleware that has experts read before their requests, before an application that says what reached it."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from meswitch.vllm.command import DIRECTORY_VARIABLE
from meswitch.vllm.middleware import Prefetch


class Engine:
    """Says `loading` twice, then `ready`, and remembers what was asked."""

    def __init__(self):
        self.asked = []

    async def collective_rpc(self, method, args):
        self.asked.append((method, *args))
        return ["ready" if len(self.asked) % 3 == 0 else "loading"]


@pytest.fixture
def made(deltas):
    async def echo(request: Request) -> JSONResponse:
        return JSONResponse({"body": await request.json(), "asked before": len(request.app.state.engine_client.asked)})

    paths = ("/v1/chat/completions", "/v1/load_lora_adapter", "/v1/models")
    app = Starlette(routes=[Route(path, echo, methods=["POST"]) for path in paths])
    app.state.engine_client = Engine()
    adapters = {"math": SimpleNamespace(lora_path=str(deltas["math"]))}
    app.state.openai_serving_models = SimpleNamespace(lora_requests=adapters)
    app.add_middleware(Prefetch)
    return app


def send(app, path, body):
    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return (await client.post(path, json=body)).json()

    return asyncio.run(ask())


def test_a_request_for_an_expert_waits_until_it_is_read(made, deltas):
    body = {"model": "math", "messages": []}
    answer = send(made, "/v1/chat/completions", body)
    assert answer == {"body": body, "asked before": 3}
    assert made.state.engine_client.asked == [("prefetch_delta", str(deltas["math"].resolve()))] * 3
    assert send(made, "/v1/chat/completions", body)["asked before"] == 3  # resident a moment ago


def test_so_does_one_that_loads_it(made, deltas):
    body = {"lora_name": "code", "lora_path": str(deltas["code"])}
    assert send(made, "/v1/load_lora_adapter", body)["asked before"] == 3


def test_names_below_the_resolvers_directory(made, deltas, monkeypatch):
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(deltas["sql"].parent))
    assert send(made, "/v1/chat/completions", {"model": deltas["sql"].name})["asked before"] == 3
    assert send(made, "/v1/chat/completions", {"model": f"../{deltas['sql'].parent.name}/nobody"})["asked before"] == 3


@pytest.mark.parametrize("body", [{"model": "base"}, {"model": ["math"]}, [], {"model": "../math"}, {}])
def test_what_is_for_no_expert_goes_through_as_it_is(made, body):
    assert send(made, "/v1/chat/completions", body) == {"body": body, "asked before": 0}


def test_other_paths_are_not_read(made):
    assert send(made, "/v1/models", {"model": "math"})["asked before"] == 0

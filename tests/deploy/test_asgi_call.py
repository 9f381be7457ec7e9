"""Calling an application in this process."""

import asyncio

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from meswitch.deploy.replica import Head, call

app = FastAPI()
ended = []


@app.post("/echo")
async def echo(request: Request) -> dict:
    return {"body": (await request.body()).decode(), "header": request.headers["x-one"]}


@app.get("/count")
async def count() -> StreamingResponse:
    async def numbers():
        try:
            for i in range(1000):
                yield f"{i} "
                await asyncio.sleep(0)
        finally:
            ended.append(True)

    return StreamingResponse(numbers())


@app.get("/broken")
async def broken() -> None:
    raise ValueError("no")


async def whole(*request) -> list:
    return [piece async for piece in call(app, *request)]


def test_head_then_body():
    head, *body = asyncio.run(whole("POST", "/echo", [(b"x-one", b"1")], b"text"))
    assert isinstance(head, Head)
    assert head.status == 200
    assert (b"content-type", b"application/json") in head.headers
    assert b"".join(body) == b'{"body":"text","header":"1"}'


def test_whoever_stops_reading_ends_the_answer():
    async def some() -> None:
        pieces = call(app, "GET", "/count", [], b"")
        assert isinstance(await anext(pieces), Head)
        assert await anext(pieces) == b"0 "
        await pieces.aclose()

    ended.clear()
    asyncio.run(asyncio.wait_for(some(), 10))
    assert ended == [True]


def test_an_application_that_fails_is_not_silent():
    with pytest.raises(ValueError, match="no"):
        asyncio.run(whole("GET", "/broken", [], b""))

"""`benchmarks/serving/faults.py` and `server_load.py` in small: what is broken gets one error, the others answers."""

import asyncio
import os
import socket

import httpx
import pytest

from tests.support.http_server import QUESTIONS, ask_with, is_idle, user, wait_until

SERVED = ("base", "math", "code")


@pytest.fixture(scope="module")
def broken(benchmark_script):
    return benchmark_script("serving.faults")


def test_broken_requests_are_refused_and_right_ones_answered(broken, url, engine):
    with httpx.Client(base_url=url, timeout=60) as client:
        seen, wrong = broken.requests(client, 120)
    assert wrong == []
    assert seen["400"] > 25
    assert seen["200"] > 3
    assert wait_until(lambda: is_idle(engine))


def test_broken_artifacts_never_load_as_something_else(broken, math_delta, tmp_path):
    seen, wrong = broken.artifacts(math_delta, tmp_path, 80)
    assert wrong == []
    assert seen["ArtifactError"] > 30


def test_broken_family_files_are_named(broken, family, tmp_path):
    seen, wrong = broken.families((family / "family.toml").read_text(), tmp_path, 250)
    assert wrong == []
    assert seen["ConfigError"] > 60


def test_under_load_every_answer_is_right_and_nothing_is_left(benchmark_script, url, engine, monkeypatch):
    load = benchmark_script("serving.load")
    monkeypatch.setattr(load, "EXPERTS", ("math", "code"))
    monkeypatch.setattr(load, "TOKENS", 12)
    seen = load.Seen()

    async def run():
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            right = {(m, q): (await load.answer(client, m, q))[1] for m in SERVED for q in load.QUESTIONS}
        until = load.time.monotonic() + 3
        asking = [load.ask_again_and_again(url, right, until, seed, seen) for seed in range(16)]
        looking = asyncio.to_thread(load.look, url, os.getpid(), 3, 0.2)
        return (await asyncio.gather(looking, *asking))[0]

    health, curve, late = asyncio.run(run())
    assert (seen.wrong, seen.failed) == ([], {})
    assert seen.right > 16
    assert len(health) == len(late) > 3
    assert curve[0].keys() == {"rss_mb", "threads", "files"}
    assert wait_until(lambda: is_idle(engine))
    assert engine.kv_used_tokens == 0


def test_clients_that_vanish_in_the_middle_leave_nothing(url, engine):
    host, port = url.removeprefix("http://").split(":")
    body = b'{"model": "math", "prompt": "a", "max_tokens": 1500, "temperature": 1, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    raw = head % len(body) + body
    for cut in (*range(1, len(raw), 25), len(raw)):
        with socket.create_connection((host, int(port)), timeout=10) as one:
            one.sendall(raw[:cut])
            if cut == len(raw):
                assert one.recv(10)
    right = ask_with(url).chat.completions.create(model="math", messages=user(QUESTIONS["math"]), max_tokens=4)
    assert right.choices
    assert wait_until(lambda: is_idle(engine))

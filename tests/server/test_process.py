"""The server as a process: few files, idle crowds, slow clients, signals."""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import httpx
import pytest

from meswitch.server import create_app
from meswitch.server import process as server_process
from meswitch.server.process import Listening, Server
from tests.support.http_server import ask_with, is_idle, serving, user, wait_until

SERVE = "import typer; from meswitch.cli.serve import serve_command; typer.run(serve_command)"
LONG = {"model": "base", "prompt": "The sea", "max_tokens": 1800, "temperature": 1.0, "seed": 1, "stream": True}
FILES = 256


def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))


@pytest.fixture
def process(family_file, tmp_path):
    """`meswitch serve` with 256 files, one slot, a second of grace, and its log as JSON; (process, url)."""
    file = tmp_path / "family.toml"
    file.write_text(family_file.read_text() + "[engine]\nslots = 1\n[server]\ngrace_seconds = 1\n")
    command = [sys.executable, "-c", SERVE, str(file), "--port", "0", "--json", "--log-level", "info"]
    command += ["--log-format", "json"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=few_files
    )
    try:
        yield started, json.loads(started.stdout.readline())["url"].removesuffix("/v1")
    finally:
        started.kill()
        started.communicate()


def streamed(url, lines):
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=30) as response:
        lines.extend(response.iter_lines())


@pytest.mark.slow
def test_an_idle_crowd_shuts_nobody_out_and_two_signals_end_all_in_order(process):
    server, url = process
    host, port = url.removeprefix("http://").split(":")
    crowd = [socket.create_connection((host, int(port)), timeout=10) for _ in range(FILES + 20)]
    client = ask_with(url)
    for model in ("math", "code", "math"):  # one slot: each is read from its files
        raw = client.chat.completions.with_raw_response.create(
            model=model, messages=user("add"), max_tokens=2, extra_headers={"x-request-id": f"ask-{model}"}
        )
        assert raw.headers["x-request-id"] == f"ask-{model}"
    assert httpx.get(f"{url}/health").status_code == 200
    lines: list[str] = []
    thread = threading.Thread(target=streamed, args=(url, lines))
    thread.start()
    assert wait_until(lambda: httpx.get(f"{url}/health").json()["running"] == 1)
    for _ in range(2):
        server.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert server.wait(timeout=30) == 0
    thread.join(20)
    assert "the server was asked to stop" in lines[-2]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    log = [json.loads(line) for line in server.stderr.read().splitlines()]
    assert not any("trace" in line for line in log)
    asked = {line["request_id"]: line for line in log if line.get("request_id", "").startswith("ask-")}
    assert asked["ask-math"]["expert"] == "math"
    assert asked["ask-math"]["completion_tokens"] <= 2 < asked["ask-math"]["prompt_tokens"]
    assert 0 < asked["ask-code"]["ttft"] <= asked["ask-code"]["seconds"]
    for one in crowd:
        one.close()


@pytest.mark.slow
def test_a_hang_up_reads_the_family_again_and_answers_get_their_time_at_the_end(process, tmp_path):
    server, url = process
    file = tmp_path / "family.toml"
    before, code = file.read_text().split('[[expert]]\nname = "code"')
    file.write_text(before + "[engine]" + code.partition("[engine]")[2])
    server.send_signal(signal.SIGHUP)
    assert wait_until(lambda: [card.id for card in ask_with(url).models.list()] == ["base", "math", "auto"])
    lines: list[str] = []
    thread = threading.Thread(target=streamed, args=(url, lines))
    thread.start()
    assert wait_until(lambda: httpx.get(f"{url}/health").json()["running"] == 1)
    server.send_signal(signal.SIGTERM)
    time.sleep(0.4)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")
    assert thread.is_alive()  # the answer goes on
    assert server.wait(timeout=30) == 0
    thread.join(20)
    assert "the server was asked to stop" in lines[-2]
    assert "Traceback" not in server.stderr.read()


@pytest.mark.slow
def test_a_log_on_a_full_disk_keeps_nobody_from_an_answer(family_file):
    command = [sys.executable, "-c", SERVE, str(family_file), "--port", "0", "--json", "--log-level", "info"]
    with open("/dev/full", "w") as full:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=full, text=True)
        try:
            url = json.loads(server.stdout.readline())["url"].removesuffix("/v1")
            for number in range(200):  # more than a buffer holds
                assert httpx.get(f"{url}/v1/models/nobody-{number}").status_code == 404
            client = ask_with(url)
            for model in ("math", "code", "auto"):
                assert client.completions.create(model=model, prompt="add", max_tokens=2).choices
            assert httpx.get(f"{url}/health").status_code == 200
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_with_a_certificate_it_speaks_https(engine, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    listening = Listening(tls_cert=cert, tls_key=key)
    server = Server(create_app(engine, close_engine=False), engine, listening)
    with serving(server.config.app, server) as url:
        trusted = ssl.create_default_context(cafile=str(cert))
        assert httpx.get(f"{url.replace('http', 'https')}/health", verify=trusted).json()["status"] == "ok"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")


@pytest.fixture
def bounded(engine, monkeypatch):
    """(address, its bounds) of a server with room for 8, and little patience."""
    for name, seconds in (("HEAD_SECONDS", 0.5), ("BODY_SECONDS", 1.0), ("READ_SECONDS", 1.0), ("_LOOK_EVERY", 0.1)):
        monkeypatch.setattr(server_process, name, seconds)
    server = Server(create_app(engine, close_engine=False), engine, Listening(connections=8))
    with serving(server.config.app, server) as url:
        yield url, server.bounds


def open_to(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
    ],
    ids=["nothing", "half a head", "half a body"],
)
def test_a_slow_client_is_cut(bounded, sent, caplog):
    url, bounds = bounded
    with open_to(url) as one:
        one.sendall(sent)
        assert wait_until(lambda: len(bounds) == 1)
        with contextlib.suppress(ConnectionResetError):
            assert one.recv(100) == b""
    assert wait_until(lambda: len(bounds) == 0)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_client_that_does_not_read_its_answer_is_cut_and_others_are_answered(bounded, engine):
    url, bounds = bounded
    body = {**LONG, "max_tokens": 1000, "n": 8, "logprobs": 20}  # some 20 MB
    raw = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = url.removeprefix("http://").split(":")
        one.connect((host, int(port)))
        one.sendall(head % len(raw) + raw)
        assert wait_until(lambda: engine.load()["running"] == 8)
        answer = ask_with(url).completions.create(model="math", prompt="a", max_tokens=2)
        assert answer.usage.completion_tokens == 2
        assert wait_until(lambda: len(bounds) == 0, 60)  # while it is there and does not read
    assert wait_until(lambda: is_idle(engine))


def test_a_head_without_an_end_is_cut(bounded):
    url, bounds = bounded
    with open_to(url) as one, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        one.sendall(b"GET /health HTTP/1.1\r\n")
        for _ in range(1000):  # 64 MB
            one.sendall(b"X-Much: " + b"a" * 65000 + b"\r\n")
        pytest.fail("it was read to its end")
    assert wait_until(lambda: len(bounds) == 0)
    with open_to(url) as one:
        one.sendall(b"GET /health HTTP/1.1\r\nX-Much: " + b"a" * 8000 + b"\r\n\r\n")
        assert one.recv(100).startswith(b"HTTP/1.1 200")


def test_with_all_connections_busy_one_more_is_told_to_come_again(bounded):
    url, bounds = bounded
    with httpx.Client(base_url=url, timeout=20) as client:
        streams = [client.stream("POST", "/v1/completions", json=LONG) for _ in range(8)]
        opened = [stream.__enter__() for stream in streams]
        assert all(response.status_code == 200 for response in opened)
        answer = httpx.get(f"{url}/health")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_connections")
        for stream in streams:
            stream.__exit__(None, None, None)
    assert wait_until(lambda: len(bounds) < 8)
    assert httpx.get(f"{url}/health").status_code == 200

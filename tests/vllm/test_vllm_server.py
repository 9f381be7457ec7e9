"""`meswitch serve --engine vllm`: vLLM's own server, the family's experts as models, `auto`, loading at run time."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from meswitch import Family
from meswitch.errors import ArtifactError, IncompatibleError
from meswitch.router import Encoder, Row, train_router
from meswitch.vllm.command import command
from vllm_engines import EXPERTS, NEW_TOKENS, PROMPT, needs_vllm

SERVE = "import typer; from meswitch.cli.serve import serve; typer.run(serve)"
SERVED = ("math", "code")
START = 240  # seconds


@pytest.fixture(scope="module")
def family_file(family, deltas, tmp_path_factory):
    """math and code, with a router of 120 real queries."""
    rows: dict[str, list[Row]] = {name: [] for name in (*SERVED, "other")}
    for line in (family / "routing.jsonl").read_text().splitlines():
        data = json.loads(line)
        domain = data["domain"] if data["domain"] in SERVED else "other"
        if len(rows[domain]) < 40:
            rows[domain].append(Row(data["query"], domain))
    directory = tmp_path_factory.mktemp("vllm-family")
    router = train_router([row for some in rows.values() for row in some], SERVED, Encoder.load(family / "base"))
    router.save(directory / "router")
    text = f'[base]\npath = "{family / "base"}"\n[router]\npath = "router"\n[engine]\nslots = 2\ndtype = "float32"\n'
    for name in SERVED:
        text += f'[[expert]]\nname = "{name}"\ndelta = "{deltas[name]}"\n'
    (directory / "family.toml").write_text(text)
    return directory / "family.toml"


def test_the_command_line_of_a_family(family_file, family, deltas):
    arguments = command(Family.load(family_file), "127.0.0.1", 8123, 2)
    assert arguments[:2] == ["serve", str(family / "base")]
    line = shlex.join(arguments)
    assert f"--lora-modules math={deltas['math']} code={deltas['code']} --additional-config" in line
    assert "--worker-cls meswitch.vllm.DeltaWorker --enable-lora --max-loras 2 --max-cpu-loras 2" in line
    assert line.endswith("size\": 64}' --middleware meswitch.vllm.auto.AutoRouting")
    settings = json.loads(arguments[arguments.index("--additional-config") + 1])
    assert settings == {"meswitch": {"experts": [str(deltas["math"]), str(deltas["code"])], "lora": False}}


def test_a_family_that_vllm_cannot_serve_is_refused(family_file, family, deltas, tmp_path):
    text = family_file.read_text().replace(str(deltas["code"]), str(tmp_path / "nowhere"))
    (tmp_path / "family.toml").write_text(text)
    with pytest.raises(ArtifactError, match=r"'code': .*no such artifact; make it with `meswitch compress"):
        command(Family.load(tmp_path), "127.0.0.1", 8123, 2)
    other = tmp_path / "code"
    other.mkdir()
    for file in deltas["code"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "chat_template.jinja").write_text("another")
    (tmp_path / "family.toml").write_text(family_file.read_text().replace(str(deltas["code"]), str(other)))
    with pytest.raises(IncompatibleError, match="one template for all models of a server"):
        command(Family.load(tmp_path), "127.0.0.1", 8123, 2)


def ask(url, path, body=None):
    """(status, headers, parsed body)"""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
            return answer.status, answer.headers, json.loads(text) if text[:1] in (b"{", b"[") else text
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


@pytest.fixture(scope="module")
def url(family_file):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    arguments = [sys.executable, "-c", SERVE, str(family_file), "--engine", "vllm", "--port", str(port)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START
    try:
        while True:
            try:
                if ask(address, "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.5)
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"the server did not start:\n{process.communicate()[0][-4000:]}")
        yield address
    finally:
        process.terminate()  # the server ends its engine's process
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def completion(url, model):
    body = {"model": model, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    return ask(url, "/v1/completions", body | {"return_token_ids": True})


@needs_vllm
def test_experts_are_models_of_vllms_server(url, expected):
    assert {model["id"] for model in ask(url, "/v1/models")[2]["data"]} == {"base", *SERVED}
    for name in ("math", "base", "code", "math"):
        status, _, answer = completion(url, name)
        assert (status, answer["model"]) == (200, name)
        assert tuple(answer["choices"][0]["token_ids"]) == expected[name, len(PROMPT)]


@needs_vllm
def test_auto_is_the_routers_choice(url):
    question = "Ravi shares 8 books equally among 4 friends. How many books does each friend get?"
    body = {"model": "auto", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 60}
    status, headers, answer = ask(url, "/v1/chat/completions", body)
    assert (status, headers["x-meswitch-expert"], answer["model"]) == (200, "math", "math")
    assert answer["choices"][0]["message"]["content"].endswith("#### 2")
    assert ask(url, "/v1/chat/completions", body | {"model": "nobody"})[0] == 404


@needs_vllm
def test_experts_come_and_go_at_run_time(url, deltas, expected):
    assert "sql" in EXPERTS
    status, _, problem = ask(url, "/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": "/nowhere/sql"})
    assert status >= 400
    assert completion(url, "sql")[0] == 404
    status, _, problem = ask(url, "/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": str(deltas["sql"])})
    assert status == 200, problem
    assert tuple(completion(url, "sql")[2]["choices"][0]["token_ids"]) == expected["sql", len(PROMPT)]
    assert ask(url, "/v1/unload_lora_adapter", {"lora_name": "sql"})[0] == 200
    assert completion(url, "sql")[0] == 404
    assert tuple(completion(url, "math")[2]["choices"][0]["token_ids"]) == expected["math", len(PROMPT)]

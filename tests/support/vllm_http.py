"""vLLM's own server as a process, and requests to it."""

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import pytest

from tests.support.vllm_engines import NEW_TOKENS, PROMPT

START = 240  # seconds


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(arguments, port, **variables):
    """Its address once it answers.

    Args:
        arguments: the command that serves at `port`. variables: of its environment.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} | variables
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    with tempfile.TemporaryFile("w+") as said:  # not a pipe: one that nobody reads fills up, and the server waits
        process = subprocess.Popen(arguments, stdout=said, stderr=subprocess.STDOUT, text=True, env=environment)
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START
        try:
            while not _healthy(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    said.seek(0)
                    pytest.fail(f"the server did not start:\n{said.read()[-4000:]}")
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()  # the server ends its engine's process
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(address):
    try:
        return ask(address, "/health")[0] == 200
    except OSError:
        return False


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


def completion(url, model):
    """(status, headers, parsed body) of the usual prompt's greedy answer."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    return ask(url, "/v1/completions", body | {"return_token_ids": True})


def answer_of(url, model):
    """The answer's token ids, or fail with what the server said."""
    status, _, body = completion(url, model)
    assert status == 200, body
    return tuple(body["choices"][0]["token_ids"])

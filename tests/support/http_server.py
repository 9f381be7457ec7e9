"""Running a real server, and asking it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import uvicorn

from meswitch import Engine
from meswitch.server.auto import AutoPolicy

EXPERTS = ("math", "code")
QUESTIONS = {
    "math": "Ravi shares 8 books equally among 4 friends. How many books does each friend get?",
    "code": "Write a Python function that returns the sum of a list.",
    "base": "Tell me about the sea.",
}


def policy(engine, router, fallback=None):
    return AutoPolicy(router, lambda: engine.names, base=engine.base_name, fallback=fallback, prefetch=engine.prefetch)


def user(text):
    return [{"role": "user", "content": text}]


@contextmanager
def serving(app, server: uvicorn.Server | None = None) -> Iterator[str]:
    """The address of a running server, plain uvicorn's unless another is given."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = server or uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def ask_with(url: str, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def wait_until(condition, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def is_idle(engine: Engine) -> bool:
    return engine.load() == {"waiting": 0, "running": 0} and all(row.pins == 0 for row in engine.store.residency())

"""Experts that the worker reads in the background answer as ever, and a request waits for them outside the engine."""

import shutil
import threading
import time

import pytest

from tests.support.vllm_engines import PROMPT, ask, with_deltas
from tests.support.vllm_http import answer_of
from tests.support.vllm_http import ask as request

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(family, expected):
    with with_deltas(family / "base", max_loras=2, max_cpu_loras=2) as engine:
        yield engine


def prefetch(engine, directory):
    """What the worker says in the end."""
    for _ in range(600):
        (state,) = engine.collective_rpc("prefetch_delta", args=(str(directory),))
        if state != "loading":
            return state
        time.sleep(0.05)
    raise AssertionError("still loading")


@pytest.fixture
def copy(deltas, tmp_path):
    """A copy of an expert, under a name of its own: other weights may not take one that vLLM has cached prompts for."""

    def made(name):
        return shutil.copytree(deltas[name], tmp_path / name)

    return made


def test_what_was_read_in_the_background_is_what_the_request_gets(engine, copy, expected):
    directory = copy("math")
    assert prefetch(engine, directory) == "ready"
    for file in directory.glob("*.safetensors"):  # nothing is read a second time
        file.unlink()
    assert ask(engine, [PROMPT], [("early", 21, directory)]) == [expected["math", len(PROMPT)]]
    assert prefetch(engine, directory) == "ready"  # it is resident: read once


def test_an_expert_that_changed_on_disk_since_is_read_anew(engine, copy, deltas, expected):
    directory = copy("code")
    assert prefetch(engine, directory) == "ready"
    shutil.rmtree(directory)
    shutil.copytree(deltas["sql"], directory)
    assert ask(engine, [PROMPT], [("changed", 22, directory)]) == [expected["sql", len(PROMPT)]]


def test_a_damaged_one_is_refused_by_the_request_that_loads_it(engine, copy, deltas, expected):
    directory = copy("instruct")
    file = next(directory.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert prefetch(engine, directory) == "failed"
    from vllm.lora.request import LoRARequest

    with pytest.raises(ValueError, match="checksum differs"):
        engine.llm_engine.add_lora(LoRARequest("damaged", 23, str(directory)))
    assert ask(engine, [PROMPT], [("whole", 24, deltas["instruct"])]) == [expected["instruct", len(PROMPT)]]


def test_only_two_wait_to_be_taken(engine, copy, expected):
    directories = {name: copy(name) for name in ("math", "code", "sql")}
    for directory in directories.values():
        assert prefetch(engine, directory) == "ready"
    for place, name in enumerate(("sql", "code", "math")):  # math was dropped, and is read again
        assert ask(engine, [PROMPT], [(f"late {name}", 31 + place, directories[name])]) == [expected[name, len(PROMPT)]]


def test_two_names_of_one_artifact_share_its_memory(engine, copy, expected):
    directory = copy("code")
    assert ask(engine, [PROMPT], [("one", 41, directory)]) == [expected["code", len(PROMPT)]]
    for file in directory.glob("*.safetensors"):
        file.unlink()
    both = [("one", 41, directory), ("other", 42, directory)]
    assert ask(engine, [PROMPT] * 2, both) == [expected["code", len(PROMPT)]] * 2


def test_a_directory_without_an_artifact_is_left_to_vllm(engine, tmp_path):
    assert prefetch(engine, tmp_path) == "ready"


def test_the_server_loads_experts_while_it_streams(by_hand, deltas, tmp_path, expected):
    url, _ = by_hand
    directory = shutil.copytree(deltas["sql"], tmp_path / "sql")
    answers = []
    streaming = threading.Thread(target=lambda: answers.append(answer_of(url, "base")))
    streaming.start()
    body = {"lora_name": "streamed", "lora_path": str(directory)}
    assert request(url, "/v1/load_lora_adapter", body)[0] == 200
    assert answer_of(url, "streamed") == expected["sql", len(PROMPT)]
    streaming.join()
    assert answers == [expected["base", len(PROMPT)]]

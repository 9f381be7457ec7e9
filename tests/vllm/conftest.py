"""The family's merged models, what each answers in vLLM, and a server of the family."""

import shutil
import sys

import pytest

from tests.support.vllm_engines import PROMPT, ask, running
from tests.support.vllm_http import free_port, serving


def pytest_collection_modifyitems(items):
    """What is asked of transformers' classes alone comes first: vLLM changes them in the process where it runs."""
    items.sort(key=lambda item: item.path.name != "test_vllm_support.py")


@pytest.fixture(scope="session")
def merged(family, deltas, tmp_path_factory):
    """Each expert's merged model, and the base: name -> checkpoint."""
    from meswitch.compression.merge import merge

    root = tmp_path_factory.mktemp("merged")
    models = {name: merge(family / "base", path, root / name, dtype="float32") for name, path in deltas.items()}
    return {"base": family / "base"} | models


@pytest.fixture(scope="session")
def expected(merged):
    """(name, prompt length) -> what the merged model answers in the same vLLM, alone."""
    answers = {}
    for name, path in merged.items():
        with running(path) as engine:
            for length in (len(PROMPT), 12):
                (answers[name, length],) = ask(engine, [PROMPT[:length]])
    return answers


@pytest.fixture(scope="session")
def by_hand(family, deltas, tmp_path_factory):
    """`vllm serve` with our worker, which knows no expert at start: its address, and where it may find some."""
    directory = tmp_path_factory.mktemp("found") / "deltas"
    shutil.copytree(deltas["math"], directory / "math")
    shutil.copytree(deltas["code"], directory / "team" / "code")
    port = free_port()
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(family / "base")]
    arguments += ["--served-model-name", "base", "--worker-cls", "meswitch.vllm.DeltaWorker", "--enable-lora"]
    arguments += ["--max-loras", "2", "--max-cpu-loras", "4", "--max-lora-rank", "8", "--dtype", "float32"]
    arguments += ["--max-model-len", "512", "--enforce-eager", "--block-size", "32", "--port", str(port)]
    arguments += ["--middleware", "meswitch.vllm.middleware.Prefetch"]
    with serving(arguments, port, MESWITCH_DELTA_DIR=str(directory)) as address:
        yield address, directory

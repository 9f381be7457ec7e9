"""Real models for all tests: the trained family, and small random pairs for the cases it does not have."""

import gc
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import meswitch
from tests.support.models import make_pair

ROOT = Path(__file__).parent.parent
FAMILY = ROOT / "examples" / "family"


def pytest_configure(config):
    # the matrices are small: a second thread costs more in waiting than it computes
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Skips what this machine or environment does not have, and says which files come first: by their markers."""
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a GPU"
    if importlib.util.find_spec("vllm") is None:
        missing["vllm"] = "needs vLLM: `make test-vllm`"
    if importlib.util.find_spec("ray") is None:
        missing["ray"] = "needs Ray: `make test-ray`"
    for item in items:
        for name, reason in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
    # files with slow tests first: one that starts last holds its worker while the other has nothing left to do
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """What is there before a module's tests is not looked through by the collections that closing an engine makes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def family() -> Path:
    return FAMILY


@pytest.fixture(scope="session")
def deltas(tmp_path_factory) -> dict[str, Path]:
    """Data-free artifacts of the family's experts."""
    root = tmp_path_factory.mktemp("deltas")
    for name in ("math", "code", "instruct", "sql"):
        meswitch.compress(FAMILY / "base", FAMILY / name, root / name)
    return {name: root / name for name in ("math", "code", "instruct", "sql")}


@pytest.fixture(scope="session")
def math_delta(deltas) -> Path:
    return deltas["math"]


@pytest.fixture
def pair(tmp_path):
    """`pair(arch, **case)` writes a small random base and expert and gives their directories."""

    def build(arch: str = "mistral", **case):
        return make_pair(tmp_path / f"{arch}-pair", FAMILY / "base", arch, **case)

    return build


@pytest.fixture(scope="session")
def benchmark_script() -> Callable[[str], ModuleType]:
    """Imports a script of `benchmarks/` by folder and name: `benchmark_script("serving.load")`."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")

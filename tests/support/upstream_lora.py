"""Runs LoRA tests of vLLM's own repository with our worker: a pytest plugin.

Wheels do not have them; the source archive of the installed version does. From its root, with pytest-asyncio:

    PYTHONPATH=MESWITCH/tests/vllm python -m pytest --noconftest -p upstream_lora -p pytest_asyncio \\
        tests/lora/test_lora_functions.py tests/lora/test_worker.py

The models that they take from a hub are replaced by the family's base and random adapters, and vLLM's default worker by
ours; nothing else of them is changed. Tests that compare a certain model's words cannot run this way.
"""

import tempfile
from pathlib import Path

import pytest

from tests.support import vllm_engines
from tests.support.vllm_adapters import make_lora

BASE = Path(__file__).parents[2] / "examples" / "family" / "base"


def pytest_configure(config):
    from vllm.engine.arg_utils import EngineArgs

    made = Path(tempfile.mkdtemp(prefix="upstream-lora-"))
    config.stash[_adapters] = {name: make_lora(made / name, BASE, 8, seed=i) for i, name in enumerate(("Alice", "Bob"))}
    init = EngineArgs.__post_init__

    def with_our_worker(self):
        self.worker_cls = vllm_engines.WORKER
        self.dtype = "float32"
        init(self)

    EngineArgs.__post_init__ = with_our_worker


_adapters = pytest.StashKey()


@pytest.hookimpl
def pytest_collection_modifyitems(config, items):
    from meswitch.vllm import DeltaWorker

    alice, bob = (str(config.stash[_adapters][name]) for name in ("Alice", "Bob"))
    for module in {item.module for item in items}:
        replacements = {
            "MODEL_PATH": str(BASE),
            "LORA_MODULE_PATH": alice,
            "LORA_NAME_PATH_MAP": {"Alice": alice, "Bob": bob, "Cat": bob},
            "Worker": DeltaWorker,
        }
        for name, value in replacements.items():
            if hasattr(module, name):
                setattr(module, name, value)


@pytest.fixture
def qwen3_lora_files(request):
    return str(request.config.stash[_adapters]["Alice"])

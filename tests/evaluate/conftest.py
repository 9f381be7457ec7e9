from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch.compression.pipeline import compress

FAMILY = Path(__file__).parents[2] / "examples" / "family"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small lose more by sharing the cores than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def family() -> Path:
    return FAMILY


def load(name: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(FAMILY / name, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(FAMILY / name)


@pytest.fixture(scope="session")
def base() -> tuple[Any, Any]:
    return load("base")


@pytest.fixture(scope="session")
def math_expert() -> tuple[Any, Any]:
    return load("math")


@pytest.fixture(scope="session")
def code_expert() -> tuple[Any, Any]:
    return load("code")


@pytest.fixture(scope="session")
def math_delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deltas") / "math"
    compress(FAMILY / "base", FAMILY / "math", out, bits=4)
    return out

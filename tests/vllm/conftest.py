"""The family's merged models, and what each answers in vLLM."""

import pytest

from vllm_engines import PROMPT, ask, running


@pytest.fixture(scope="session")
def merged(family, deltas, tmp_path_factory):
    """Each expert's merged model, and the base: name -> checkpoint."""
    from meswitch.compression import merge

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

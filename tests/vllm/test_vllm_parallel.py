"""Several ranks: each has its share of every delta."""

import pytest

from tests.support.vllm_engines import EXPERTS, PROMPT, adapters_of, ask, with_deltas

pytestmark = pytest.mark.vllm
NAMES = ("base", *EXPERTS)


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a function for the workers
    return {"distributed_executor_backend": "mp", "max_loras": 2}


def test_two_ranks_answer_as_one(family, deltas, expected, two_processes):
    known = adapters_of(deltas)
    with with_deltas(family / "base", tensor_parallel_size=2, **two_processes) as engine:
        answers = ask(engine, [PROMPT] * len(NAMES), [known[name] for name in NAMES])
    assert answers == [expected[name, len(PROMPT)] for name in NAMES]


def make_buffer(worker):
    """What vLLM makes when it warms up, which it does not do on a CPU where LoRA is on: see docs/use/vllm.md."""
    runner = worker.model_runner
    if runner.intermediate_tensors is not None:  # as in vLLM 0.25
        return
    runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
    )


def test_two_stages_of_a_pipeline_answer_as_one(family, deltas, expected, two_processes):
    known, names = adapters_of(deltas), NAMES * 2
    with with_deltas(family / "base", pipeline_parallel_size=2, max_num_seqs=4, **two_processes) as engine:
        engine.collective_rpc(make_buffer)
        answers = ask(engine, [PROMPT] * len(names), [known[name] for name in names])
    assert answers == [expected[name, len(PROMPT)] for name in names]

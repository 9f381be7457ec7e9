"""Tensor parallelism: each rank has its share of every delta."""

from vllm_engines import EXPERTS, PROMPT, adapters_of, ask, needs_vllm, with_deltas

pytestmark = needs_vllm
NAMES = ("base", *EXPERTS)


def test_two_ranks_answer_as_one(family, deltas, expected, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    known = adapters_of(deltas)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_loras": 2}
    with with_deltas(family / "base", **options) as engine:
        answers = ask(engine, [PROMPT] * len(NAMES), [known[name] for name in NAMES])
    assert answers == [expected[name, len(PROMPT)] for name in NAMES]

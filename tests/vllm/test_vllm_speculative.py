"""Speculative decoding: guessed tokens are checked by the expert of the request that they are guessed for."""

import pytest

from tests.support.vllm_engines import EXPERTS, PROMPT, adapters_of, ask, with_deltas

pytestmark = pytest.mark.vllm
NAMES = ("base", *EXPERTS)
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"


def test_guesses_change_nothing(family, deltas, expected, monkeypatch):
    # in a process of its own: what guesses is compiled by numba, after which vLLM starts no other engine in a process
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    known = adapters_of(deltas)
    names = [*NAMES, *reversed(NAMES)]
    guesses = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with with_deltas(family / "base", max_loras=2, speculative_config=guesses, disable_log_stats=False) as engine:
        answers = ask(engine, [PROMPT] * len(names), [known[name] for name in names])
        accepted = [metric.value for metric in engine.get_metrics() if metric.name == ACCEPTED]
    assert answers == [expected[name, len(PROMPT)] for name in names]
    assert accepted[0] > 0

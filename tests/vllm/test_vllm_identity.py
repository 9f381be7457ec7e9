"""A request in vLLM gets its own expert, token by token what that expert's merged model gives in the same vLLM."""

import pytest

from tests.support.vllm_engines import EXPERTS, NEW_TOKENS, PROMPT, adapters_of, ask, running, with_deltas

pytestmark = pytest.mark.vllm
NAMES = ("base", *EXPERTS)


@pytest.fixture(scope="module")
def engine(family, deltas):
    """Prefix caching is vLLM's default; two slots for four experts."""
    with with_deltas(
        family / "base", max_loras=2, max_cpu_loras=3, enable_prefix_caching=True, disable_log_stats=False
    ) as engine:
        yield engine


def cached_tokens(engine):
    return next(metric.value for metric in engine.get_metrics() if metric.name == "vllm:prefix_cache_hits")


def test_the_experts_disagree_so_that_a_mix_up_would_show(expected):
    for length in (len(PROMPT), 12):
        assert len({expected[name, length] for name in NAMES}) == len(NAMES)


def test_identical_prompts_for_all_experts_at_once_with_fewer_slots_than_experts(engine, deltas, expected):
    known = adapters_of(deltas)
    names = [*NAMES, *reversed(NAMES), "math", "base"]
    for _ in range(2):  # the second time from the prefix cache, and with experts that were evicted
        answers = ask(engine, [PROMPT] * len(names), [known[name] for name in names])
        for name, answer in zip(names, answers, strict=True):
            assert answer == expected[name, len(PROMPT)], name


def test_a_shared_prefix_is_not_taken_from_another_expert(engine, deltas, expected):
    known = adapters_of(deltas)
    for name in ("math", "code", "math", "base", "instruct", "sql"):
        assert ask(engine, [PROMPT], [known[name]]) == [expected[name, len(PROMPT)]], name
    before = cached_tokens(engine)
    assert ask(engine, [PROMPT], [known["math"]]) == [expected["math", len(PROMPT)]]
    assert cached_tokens(engine) > before  # the cache is on: math's own block was found


def test_requests_that_come_while_others_run(engine, deltas, expected):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    known, core = adapters_of(deltas), engine.llm_engine
    waiting = [(name, length) for length in (12, len(PROMPT)) for name in (*NAMES, "code")]
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
    asked, answers, step = {}, {}, 0
    while len(answers) < len(waiting):
        if step % 3 == 0 and len(asked) < len(waiting):
            name, length = waiting[len(asked)]
            adapter = known[name] and LoRARequest(known[name][0], known[name][1], str(known[name][2]))
            key = f"{name}-{length}-{step}"
            asked[key] = name, length
            core.add_request(key, {"prompt_token_ids": PROMPT[:length]}, params, lora_request=adapter)
        for output in core.step():
            if output.finished:
                answers[output.request_id] = tuple(output.outputs[0].token_ids)
        step += 1
    for key, answer in answers.items():
        assert answer == expected[asked[key]], key


def test_log_probabilities_of_a_prompt_are_each_experts_own(engine, deltas, merged):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    prompt = [{"prompt_token_ids": PROMPT[:20]}]

    def scores(engine, names, requests=None):
        outputs = engine.generate(prompt * len(names), params, lora_request=requests, use_tqdm=False)
        return [[next(iter(place.values())).logprob for place in output.prompt_logprobs[1:]] for output in outputs]

    names = ("math", "base", "code")
    known = adapters_of(deltas)
    requests = [known[name] and LoRARequest(known[name][0], known[name][1], str(known[name][2])) for name in names]
    mixed = scores(engine, names, requests)
    for name, found in zip(names, mixed, strict=True):
        with running(merged[name]) as alone:
            (wanted,) = scores(alone, [name])
        assert found == pytest.approx(wanted, abs=1e-3), name


def test_a_prompt_split_over_several_steps(family, deltas, expected):
    """Chunked prefill: 16 tokens a step, requests of several experts in each."""
    known = adapters_of(deltas)
    with with_deltas(
        family / "base", enable_chunked_prefill=True, max_num_batched_tokens=16, enable_prefix_caching=False
    ) as engine:
        answers = ask(engine, [PROMPT] * len(NAMES), [known[name] for name in NAMES])
        assert answers == [expected[name, len(PROMPT)] for name in NAMES]


def test_requests_that_are_preempted_for_lack_of_cache_stay_themselves(family, deltas, expected):
    known = adapters_of(deltas)
    names = NAMES * 2
    options = {"num_gpu_blocks_override": 10, "max_model_len": 128, "disable_log_stats": False}
    with with_deltas(family / "base", **options) as engine:
        answers = ask(engine, [PROMPT[:12]] * len(names), [known[name] for name in names])
        assert answers == [expected[name, 12] for name in names]
        preempted = next(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")
        assert preempted > 0

"""A token is never computed with another request's expert: mixed batches against each expert's merged model alone."""

import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import meswitch
from meswitch import Engine, SamplingParams
from meswitch.compression.merge import load_merged
from meswitch.engine.attention import PAGE
from tests.support.models import continued

PROMPT = [{"role": "user", "content": "Tom has 23 apples. Tom buys 4 bags with 5 apples each. How many now?"}]
LONG = [{"role": "user", "content": "Write these words in capital letters: " + "river stone cloud table " * 12}]
NEW_TOKENS = 14


@pytest.fixture(scope="module")
def engine(family, deltas):
    with Engine(family / "base", deltas, device="cpu", slots=3) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(family, deltas, engine):
    """(model name, prompt number) -> the tokens that its merged model gives alone."""
    answers = {}
    for name in engine.names:
        if name == "base":
            model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.float32)
        else:
            model = load_merged(family / "base", deltas[name])
        for number, prompt in enumerate((PROMPT, LONG)):
            tokenizer = engine.tokenizers[name]
            answers[name, number] = continued(model, tokenizer.encode(prompt), tokenizer.ends, NEW_TOKENS)
    return answers


def test_the_experts_disagree_so_that_a_mix_up_would_show(expected):
    for number in (0, 1):
        assert len({expected[name, number] for name in ("base", "math", "code", "instruct", "sql")}) == 5


def test_identical_prompts_for_all_experts_at_once(engine, expected):
    names = engine.names * 2  # five models, three slots
    for number, prompt in enumerate((PROMPT, LONG)):
        answers = engine.generate([prompt] * len(names), model=names, max_new_tokens=NEW_TOKENS)
        for name, answer in zip(names, answers, strict=True):
            assert answer.model == name
            assert answer.tokens == expected[name, number], name


def test_staggered_concurrent_streaming_and_not(engine, expected):
    failures = []

    def ask(name, number, delay, streaming):
        time.sleep(delay)
        prompt = (PROMPT, LONG)[number]
        request = engine.submit(prompt, model=name, params=SamplingParams(max_new_tokens=NEW_TOKENS))
        text = "".join(chunk.text for chunk in request) if streaming else None
        result = request.result(timeout=120)
        if result.tokens != expected[name, number] or (streaming and text != result.text):
            failures.append((name, number, delay))

    jobs = [
        threading.Thread(target=ask, args=(name, (i + j) % 2, 0.07 * j + 0.02 * i, (i + j) % 3 == 0))
        for i, name in enumerate(engine.names)
        for j in range(4)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert not failures


def test_a_prefix_shared_by_two_experts_is_computed_by_each(engine, expected):
    """Right after math's answer its KV blocks are free but filled; code's identical prompt must not find them."""
    assert len(engine.tokenizers["math"].encode(LONG)) > PAGE  # whole blocks, which a prefix cache would share
    for name in ("math", "code", "math", "base", "instruct"):
        (answer,) = engine.generate([LONG], model=name, max_new_tokens=NEW_TOKENS)
        assert answer.tokens == expected[name, 1], name


def test_one_slot_serves_the_whole_family(family, deltas, expected):
    with Engine(family / "base", deltas, device="cpu", slots=1) as engine:
        names = ["sql", "math", "base", "code", "math", "instruct"]
        answers = engine.generate([PROMPT] * len(names), model=names, max_new_tokens=NEW_TOKENS)
        assert [a.tokens for a in answers] == [expected[name, 0] for name in names]
        assert engine.store.evictions >= 3


def test_a_prompt_split_over_several_steps(family, deltas, expected):
    """Chunked prefill: 16 tokens a step, experts mixed in every one of them."""
    with Engine(family / "base", deltas, device="cpu", max_batch_tokens=16) as engine:
        assert not engine.by_turns
        answers = engine.generate([LONG] * 5, model=engine.names, max_new_tokens=NEW_TOKENS)
        assert [a.tokens for a in answers] == [expected[name, 1] for name in engine.names]


def test_requests_that_are_preempted_for_lack_of_cache_stay_themselves(family, deltas, expected):
    with Engine(family / "base", deltas, device="cpu", kv_cache_tokens=512) as engine:
        names = engine.names * 2
        answers = engine.generate([LONG] * len(names), model=names, max_new_tokens=NEW_TOKENS)
        for name, answer in zip(names, answers, strict=True):
            assert answer.tokens == expected[name, 1], name


@pytest.mark.parametrize(
    ("arch", "case", "options"),
    [
        ("mistral", {"added_tokens": 2}, {"bits": 4}),
        ("mistral", {"added_tokens": 2}, {"bits": 3, "embeddings": "exact"}),
        ("llama", {"tied": True, "added_tokens": 1}, {"bits": 2, "group_size": None}),
        ("qwen2", {"added_tokens": 3}, {"bits": 1}),
        ("qwen3", {"tied": True}, {"bits": 2, "salient": 5}),
    ],
    ids=["added", "added-exact", "llama-tied-added", "qwen2-biases", "qwen3-qk-norms"],
)
def test_other_architectures_and_added_tokens(pair, tmp_path, arch, case, options):
    """By every way to compute deltas on a CPU."""
    base, expert = pair(arch, change=0.3, **case)
    meswitch.compress(base, expert, tmp_path / "delta", **options)
    merged = load_merged(base, tmp_path / "delta")
    plain_base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = list(range(5, 40))
    tokens = plain + list(range(2048, 2048 + case.get("added_tokens", 0)))
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    wanted = None
    for backend, merged_bytes in (("reference", 0), ("cpu", 0), ("cpu", None)):
        how = {"backend": backend, "merged_bytes": merged_bytes}
        with Engine(base, {"expert": tmp_path / "delta"}, device="cpu", **how) as engine:
            assert not engine.takes_turns
            requests = [
                engine.submit(tokens, model="expert", params=params),
                engine.submit(plain, model="base", params=params),
                engine.submit(plain, model="expert", params=params),
            ]
            answers = [request.result(timeout=120).tokens for request in requests]
            if wanted is None:
                ends = engine.tokenizers["expert"].ends
                wanted = [
                    continued(merged, tokens, ends, NEW_TOKENS),
                    continued(plain_base, plain, [3], NEW_TOKENS),
                    continued(merged, plain, ends, NEW_TOKENS),
                ]
                assert wanted[1] != wanted[2]
        assert answers == wanted, how


def test_added_tokens_can_be_generated_by_their_expert_only(pair, tmp_path):
    base, expert = pair(added_tokens=2)
    model = AutoModelForCausalLM.from_pretrained(expert)
    with torch.no_grad():  # the last token wins always
        model.lm_head.weight[2049] = 0
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[:2049] *= 1e-3
        model.lm_head.weight[2049] = model.model.embed_tokens.weight[7] * 100
    model.save_pretrained(expert)
    meswitch.compress(base, expert, tmp_path / "delta", bits=4)
    merged = load_merged(base, tmp_path / "delta")
    with Engine(base, {"expert": tmp_path / "delta"}, device="cpu") as engine:
        assert not engine.takes_turns
        prompts = [[7, 8, 9]] * 2
        theirs, ours = engine.generate(prompts, model=["base", "expert"], max_new_tokens=12)
        assert ours.tokens == continued(merged, [7, 8, 9], engine.tokenizers["expert"].ends, NEW_TOKENS)[:12]
        assert max(theirs.tokens) < 2048
        with pytest.raises(meswitch.MeswitchError, match="token ids of 'base' lie between 0 and 2047"):
            engine.submit([2049], model="base")

"""A step's tokens are chosen at once, and each row's as if it were alone."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from meswitch import Engine
from meswitch.engine.grammar import Grammar, is_available
from meswitch.engine.sampling import Sampler, SamplingParams, SamplingState, StepSampler
from meswitch.engine.scores import TokenScores, _cut, token_logprobs
from meswitch.errors import ConfigError

SIZE = 50
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def logits(rows, seed=0, scale=3.0):
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed)) * scale


def choose(scores, *states):
    tokens, failed = Sampler(torch.float32)(scores, states).read()
    assert failed == {}
    return tokens


def state(prompt=(), ends=(), matcher=None, **params):
    return SamplingState(SamplingParams(**params), prompt, frozenset(ends), matcher)


class Only:
    """A grammar that allows some tokens, the same each time."""

    def __init__(self, *tokens):
        self.tokens, self.taken = tokens, []

    def fill(self, mask):
        for token in self.tokens:
            mask[token // 32] |= np.int64(1 << token % 32).astype(np.int32)

    def accept(self, token):
        self.taken.append(token)


KINDS = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_k": 5, "seed": 2},
    {"temperature": 1.3, "top_p": 0.8, "seed": 3},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 4},
    {"temperature": 1.0, "min_p": 0.2, "seed": 5},
    {"presence_penalty": 2.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.5},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": -1.0, "seed": 6},
    {"logit_bias": {7: 5.0, 31: -100}},
    {"temperature": 1.0, "logit_bias": {0: 3}, "seed": 7},
    {"min_new_tokens": 4},
    {"logprobs": 3},
    {"temperature": 1.0, "logprobs": 0, "seed": 8},
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_gets_the_tokens_that_it_gets_alone(device):
    steps = [logits(len(KINDS), seed).to(device) for seed in range(6)]

    def run(rows):
        states = [state(prompt=(3, 4, 5), ends=(9,), **KINDS[row]) for row in rows]
        sampler = Sampler(torch.float32)
        return [sampler(step[rows], states).read()[0] for step in steps], states

    together, states = run(list(range(len(KINDS))))
    shuffled, _ = run(list(range(len(KINDS)))[::-1])
    for row in range(len(KINDS)):
        alone, (own,) = run([row])
        assert [step[0] for step in alone] == [step[row] for step in together] == [step[-1 - row] for step in shuffled]
        assert [one.token for one in own.logprobs] == [one.token for one in states[row].logprobs]
    # rows come and go: the random numbers and the history are the request's
    changing = [state(prompt=(3, 4, 5), ends=(9,), **kind) for kind in KINDS]
    sampler, got = Sampler(torch.float32), {row: [] for row in range(len(KINDS))}
    for turn in range(2):
        for step in steps[:3] if turn == 0 else steps[3:]:
            rows = list(range(len(KINDS))) if turn == 0 else list(range(1, len(KINDS), 2))
            for row, token in zip(rows, sampler(step[rows], [changing[row] for row in rows]).read()[0], strict=True):
                got[row].append(token)
    for row in range(1, len(KINDS), 2):
        assert got[row] == [step[row] for step in together]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_finite_logit_fails_its_request_alone(value):
    scores = logits(4)
    states = [state(temperature=1.0, seed=1), state(temperature=1.0, seed=1), state(), state(presence_penalty=1.0)]
    wanted = choose(scores, *[state(temperature=1.0, seed=1), state(temperature=1.0, seed=1), state(), state()])
    for row in (1, 3):
        scores[row] = value
    tokens, failed = Sampler(torch.float16)(scores, states).read()
    assert sorted(failed) == [1, 3]
    assert failed[1].endswith("overflow in float16")
    assert [tokens[0], tokens[2]] == [wanted[0], wanted[2]]


def test_what_parameters_leave_no_token_fails_by_name():
    matcher = Only(5)
    tokens, failed = Sampler(torch.float32)(
        logits(2), [state(ends=(5,), matcher=matcher, min_new_tokens=1), state()]
    ).read()
    assert list(failed) == [0]
    assert "leave no token" in failed[0]
    assert tokens[1] >= 0
    assert matcher.taken == []


def test_log_probabilities_that_cannot_be_computed_end_those_who_want_them_alone(monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(TokenScores, "of", no_memory)
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 1.0, 5.0]])
    states = [SamplingState(params) for params in (SamplingParams(), SamplingParams(logprobs=1), SamplingParams())]
    tokens, failed = Sampler(torch.float32)(logits, states).read()
    assert (tokens[0], tokens[2]) == (1, 2)
    assert list(failed) == [1]
    assert "the server's log says why" in failed[1]


def test_a_grammar_that_fails_ends_its_own_request():
    class Broken(Only):
        def fill(self, mask):
            raise RuntimeError("too much to follow")

    class Refusing(Only):
        def accept(self, token):
            raise RuntimeError("no such token here")

    rows = [
        state(matcher=Only(7, 40)),
        state(matcher=Broken()),
        state(matcher=Refusing(3)),
        state(temperature=1, seed=3),
    ]
    tokens, failed = Sampler(torch.float32)(logits(4), rows).read()
    assert sorted(failed) == [1, 2]
    assert "no such token here" in failed[2]
    assert tokens[0] == max((7, 40), key=lambda token: float(logits(4)[0, token]))
    assert tokens[3] == choose(logits(4)[3:], state(temperature=1, seed=3))[0]


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-38, 1e-45, 1e-300, 5e-324])
@pytest.mark.parametrize("scale", [1.0, 3e38])
def test_no_temperature_is_too_small(temperature, scale):
    row = torch.linspace(-1, 1, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(0))] * scale
    chosen = {choose(row[None], state(temperature=temperature, seed=seed))[0] for seed in range(5)}
    assert chosen == {int(row.argmax())}


@pytest.mark.parametrize(
    "options", [{"top_p": 1e-300}, {"top_p": 5e-324}, {"top_k": 1}, {"top_k": 2**70}, {"min_p": 1}]
)
def test_no_share_of_tokens_is_too_small_or_too_large(options):
    row = torch.tensor([[0.0, 3.0, -torch.inf, 1.0]])
    chosen = {choose(row, state(temperature=1.0, seed=seed, **options))[0] for seed in range(60)}
    assert chosen == ({0, 1, 3} if options.get("top_k", 0) >= 2**62 else {1})


def test_tokens_come_as_often_as_their_probabilities_say():
    row = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    count = 4000

    def shares(**options):
        states = [state(seed=seed, **{"temperature": 1.0} | options) for seed in range(count)]
        found = torch.tensor(choose(row.expand(count, -1), *states))
        return (found.bincount(minlength=4) / count).tolist()

    assert shares() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)
    assert shares(temperature=0.5) == pytest.approx([0.7246, 0.1812, 0.0652, 0.029], abs=0.03)
    assert shares(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert shares(top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
    assert shares(top_k=2, top_p=0.6) == [1.0, 0, 0, 0]  # of what top_k keeps, the first has two thirds
    assert shares(min_p=0.25) == pytest.approx([0.5556, 0.2778, 0.1667, 0], abs=0.03)
    assert shares(logit_bias={3: 100}) == [0, 0, 0, 1.0]


@pytest.mark.parametrize("size", [300, 5000])
def test_a_large_vocabulary_is_cut_as_a_loop_cuts_it(size):
    """On a CPU most rows of the larger one are cut by their head alone."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, size, generator=generator) * torch.tensor([0.01, 1.0, 8.0]).repeat(4)[:, None]
    rows[3:6] = (rows[3:6] * 2).round() / 2  # many equals
    rows -= rows.amax(-1, keepdim=True)
    ks = [1, 7, 1024, 1025, 4000, 1 << 31, 1 << 31, 1 << 31, 50, 2000, 1 << 31, 3]
    ps = [1.0, 0.5, 1.0, 0.9, 0.999, 0.3, 0.9, 1.0, 0.7, 1.0, 1e-300, 1.0]
    cut = _cut(rows, torch.tensor(ks)[:, None], torch.tensor(ps, dtype=torch.float64)[:, None])
    for row, k, p, found in zip(rows, ks, ps, cut, strict=True):
        order = sorted(range(size), key=lambda token: (-float(row[token]), token))[:k]
        weights = [math.exp(float(row[token])) for token in order]
        kept, before = [], 0.0
        for token, weight in zip(order, weights, strict=True):
            if kept and before / sum(weights) >= p and p < 1:
                break
            kept.append(token)
            before += weight
        assert found.isfinite().nonzero()[:, 0].tolist() == sorted(kept)
        assert torch.equal(found[sorted(kept)], row[sorted(kept)])


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 1, 2**64 - 1])
def test_every_seed_that_is_accepted_can_be_used(seed):
    assert choose(torch.zeros(1, SIZE), state(temperature=1.0, seed=seed))[0] in range(SIZE)


def test_seeds_of_opposite_sign_are_two_seeds():
    drawn = {seed: state(temperature=1.0, seed=seed).uniform for seed in (-1, 1, 2)}
    assert len(set(drawn.values())) == 3


def test_penalties_are_those_of_the_formula():
    """Against a slow loop in float64, over the answer's own tokens."""
    params = {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": {2: 1.5}}
    prompt = (1, 2, 3, 3)
    request, sampler, made = state(prompt=prompt, **params), Sampler(torch.float32), []
    for step in range(12):
        scores = logits(1, step, 1.0)
        expected = scores[0].double().tolist()
        expected[2] += 1.5
        for token in range(SIZE):
            if token in prompt or token in made:
                expected[token] = expected[token] / 1.4 if expected[token] > 0 else expected[token] * 1.4
            expected[token] -= 0.3 * made.count(token) + 0.7 * (token in made)
        made.append(sampler(scores, [request]).read()[0][0])
        assert made[-1] == max(range(SIZE), key=expected.__getitem__)
    assert len(set(made)) > 3


def test_nothing_ends_an_answer_before_its_least_length():
    scores = torch.full((1, SIZE), -1.0)
    scores[0, 9], scores[0, 8] = 5.0, 4.0
    request, sampler = state(ends=(9,), min_new_tokens=2), Sampler(torch.float32)
    assert [sampler(scores, [request]).read()[0][0] for _ in range(4)] == [8, 8, 9, 9]


def test_log_probabilities_are_the_models_own():
    scores = logits(2)
    wanted = scores.log_softmax(-1)
    request = state(logprobs=4, temperature=0.5, presence_penalty=2.0, logit_bias={3: 50}, seed=0)
    sampler = Sampler(torch.float32)
    tokens, _ = sampler(scores, [request, state()]).read()
    (found,) = request.logprobs
    assert (found.token, tokens[0]) == (3, 3)
    assert found.logprob == pytest.approx(float(wanted[0, 3]))
    assert [token for token, _ in found.top] == wanted[0].topk(4).indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(wanted[0].topk(4).values.tolist())
    greedy = state(logprobs=1)
    sampler(scores[:1], [greedy]).read()
    assert greedy.logprobs[0].top == ((greedy.logprobs[0].token, greedy.logprobs[0].logprob),)


def test_a_prompt_is_scored_in_parts_once():
    prompt = tuple(range(10))
    scores = logits(10)
    wanted = token_logprobs(scores[:9], prompt[1:], 2)
    request = state(prompt=prompt, prompt_logprobs=2, max_new_tokens=0)
    for first, last in [(0, 4), (2, 5), (0, 5), (5, 10)]:  # some of it again, as after a preemption
        assert request.scores_prompt
        request.score_prompt(first, scores[first:last])
    assert request.prompt_logprobs == [None, *wanted]
    assert not request.scores_prompt
    assert sum(one.logprob for one in wanted) == pytest.approx(
        sum(float(scores[i].log_softmax(-1)[token]) for i, token in enumerate(prompt[1:]))
    )


def test_a_step_of_plain_rows_is_one_maximum(monkeypatch):
    sampler = Sampler(torch.float32)
    monkeypatch.setattr(sampler, "_among", lambda *_: pytest.fail("more than a maximum"))
    scores = logits(3)
    found = sampler(scores, [state(), state(seed=3), state(top_k=4)])
    assert found.read() == (scores.argmax(-1).tolist(), {})


def test_logits_are_left_as_they_are():
    scores = logits(len(KINDS))
    before = scores.clone()
    choose(scores, *[state(prompt=(1,), **kind) for kind in KINDS])
    assert torch.equal(scores, before)


@pytest.mark.gpu
def test_choosing_never_waits_for_the_device():
    scores = logits(len(KINDS)).cuda()
    states = [state(prompt=(3, 4, 5), ends=(9,), **kind) for kind in KINDS]
    sampler = Sampler(torch.float32)
    sampler(scores, states).read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sampler(scores, states)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.read()[1] == {}


def test_as_a_logits_processor_it_leaves_each_row_one_candidate():
    failed = {}
    sampler = StepSampler(torch.float16, failed.__setitem__)
    sampler.rows = ("good", "bad", "greedy")
    sampler.states = {"good": state(temperature=1.0, seed=1), "bad": state(), "greedy": state()}
    scores = logits(3)
    wanted = [choose(scores[:1], state(temperature=1.0, seed=1))[0], 0, int(scores[2].argmax())]
    scores[1] = torch.nan
    assert sampler(torch.zeros(3), scores).argmax(-1).tolist() == wanted
    assert list(failed) == ["bad"]
    assert math.isinf(scores[0].min())
    assert scores[0].isfinite().sum() == 1


PROMPT = "Ben has 3 nuts and Ann has 5 more than he does. How many are there?"


@pytest.fixture(scope="module", params=["batch", "turns"])
def engine(family, deltas, request):
    """Steps of 16 tokens: prompts come in parts."""
    experts = {"math": deltas["math"]}
    with Engine(family / "base", experts, device="cpu", max_batch_tokens=16, runner=request.param) as engine:
        yield engine


def test_a_prompt_alone_is_scored_as_the_model_scores_it(engine, family):
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.float32).eval()
    text = PROMPT * 6  # more than two pages, which the second time are in the cache
    beside = engine.submit(PROMPT, model="math", params=SamplingParams(max_new_tokens=40))
    for _ in range(2):
        found = engine.submit(text, params=SamplingParams(max_new_tokens=0, prompt_logprobs=3)).result(60)
        assert (found.tokens, found.text, found.finish_reason) == ((), "", "length")
        tokens = engine.tokenizers["base"].encode(text)
        with torch.no_grad():
            wanted = token_logprobs(model(torch.tensor([tokens])).logits[0, :-1], tokens[1:], 3)
        first, *rest = found.prompt_logprobs
        assert first is None
        assert len(tokens) == found.prompt_tokens > 128
        assert [one.token for one in rest] == tokens[1:]
        assert [one.logprob for one in rest] == pytest.approx([one.logprob for one in wanted], abs=1e-4)
        assert [one.top[0][0] for one in rest] == [one.top[0][0] for one in wanted]
    assert beside.result(60).tokens == engine.generate([PROMPT], model="math", max_new_tokens=40)[0].tokens


def test_an_answer_and_its_prompt_have_log_probabilities(engine):
    (plain,) = engine.generate([PROMPT], model="math", max_new_tokens=12)
    (found,) = engine.generate([PROMPT], model="math", max_new_tokens=12, logprobs=2, prompt_logprobs=0)
    assert found.tokens == plain.tokens
    assert [one.token for one in found.logprobs] == list(found.tokens)
    assert all(one.top[0] == (one.token, one.logprob) and len(one.top) == 2 for one in found.logprobs)
    assert len(found.prompt_logprobs) == found.prompt_tokens
    (scored,) = engine.generate(
        [[*engine.tokenizers["math"].encode(PROMPT), *found.tokens]], model="math", max_new_tokens=0, prompt_logprobs=0
    )
    again = [one.logprob for one in scored.prompt_logprobs[found.prompt_tokens :]]
    assert again == pytest.approx([one.logprob for one in found.logprobs], abs=1e-4)
    chunks = list(engine.stream(PROMPT, model="math", max_new_tokens=12, logprobs=2))
    streamed = [one for chunk in chunks for one in chunk.logprobs]
    assert [one.token for one in streamed] == list(found.tokens)
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in found.logprobs], abs=1e-4)


def test_ends_are_what_the_request_says(engine):
    message = [{"role": "user", "content": "Ravi shares 8 books equally among 4 friends. How many books each?"}]

    def answer(**params):
        return engine.generate([message], model="math", **{"max_new_tokens": 60} | params)[0]

    plain = answer()
    (end,) = engine.tokenizers["math"].ends
    assert plain.tokens[-1] == end
    through = answer(ignore_eos=True)
    assert (len(through.tokens), through.finish_reason) == (60, "length")
    assert through.tokens[: len(plain.tokens)] == plain.tokens
    early = answer(stop_token_ids=(plain.tokens[4],))
    assert early.finish_reason == "stop"
    assert early.tokens == plain.tokens[: plain.tokens.index(plain.tokens[4]) + 1]
    later = answer(min_new_tokens=len(plain.tokens) + 3)
    assert len(later.tokens) >= len(plain.tokens) + 3
    assert end not in later.tokens[: len(plain.tokens) + 3]
    stop = plain.text[3:6]
    assert answer(stop=(stop,)).text == plain.text[: plain.text.index(stop)]
    assert len(answer(stop=(stop,), min_new_tokens=len(plain.tokens)).tokens) >= len(plain.tokens)


@pytest.mark.skipif(not is_available(), reason="needs llguidance")
def test_an_answer_follows_its_grammar(engine):
    def answer(kind, text, **params):
        return engine.generate([PROMPT], model="math", grammar=Grammar(kind, text), **params)[0].text

    assert answer("choice", '["seven", "eight"]') in ("seven", "eight")
    assert answer("regex", "[0-9]{3}-[a-c]", temperature=1.0, seed=3)[3] == "-"
    assert answer("lark", 'start: "yes" | "no"') in ("yes", "no")
    schema = '{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}'
    assert json.loads(answer("json_schema", schema))["n"] in (1, 2)
    for kind, text in [("json_schema", "{"), ("json_schema", '{"type": "x"}'), ("regex", "("), ("lark", "start: (")]:
        with pytest.raises(ConfigError, match=r"^grammar: .* cannot be used"):
            engine.submit(PROMPT, params=SamplingParams(grammar=Grammar(kind, text)))


def test_tokens_that_are_not_there_are_refused(engine):
    for name, value in {"logit_bias": {99999: 1}, "stop_token_ids": (99999,)}.items():
        with pytest.raises(ConfigError, match=f"^{name}: there is no token 99999"):
            engine.submit(PROMPT, params=SamplingParams(**{name: value}))

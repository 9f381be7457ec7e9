"""Random arrivals over many experts and few slots: every answer is its merged model's, and nothing is left behind."""

import random
import time

import pytest
from transformers import AutoModelForCausalLM

from meswitch import Engine, SamplingParams
from meswitch.compression.merge import load_merged
from meswitch.errors import MeswitchError
from tests.support.models import continued

KINDS = ("math", "code", "instruct", "sql")
RULES = "Answer in few words. The rules are these: river stone cloud table. " * 4
QUESTIONS = ["Tom has 23 apples. How many now?", "Write river in capitals", "What is 3 + 4?", "List all users"]
TEXTS = [rules + question for rules in ("", RULES[:150], RULES) for question in QUESTIONS]
NEW_TOKENS = 12
EACH, SLOTS, ARRIVALS = 10, 6, 2000


@pytest.fixture(scope="module")
def engine(family, deltas):
    """Forty experts, four of them different, in a cache that is too small for all requests."""
    experts = {f"{kind}{number}": deltas[kind] for number in range(EACH) for kind in KINDS}
    options = {"slots": SLOTS, "kv_cache_tokens": 2048, "max_queue": 2 * ARRIVALS}
    with Engine(family / "base", experts, device="cpu", **options) as engine:
        yield engine


@pytest.fixture(scope="module")
def wanted(family, deltas, engine):
    """(kind, text) -> what the merged model says alone."""
    found = {}
    for kind in ("base", *KINDS):
        base = family / "base"
        model = AutoModelForCausalLM.from_pretrained(base) if kind == "base" else load_merged(base, deltas[kind])
        model = model.float()
        tokenizer = engine.tokenizers[kind if kind == "base" else f"{kind}0"]
        for text in TEXTS:
            found[kind, text] = continued(model, tokenizer.encode(text), tokenizer.ends, NEW_TOKENS)
    return found


@pytest.mark.slow
def test_every_answer_is_its_merged_model_s_and_all_is_given_back(engine, wanted):
    draw, asked = random.Random(5), []
    for _ in range(ARRIVALS):
        kind = draw.choice((*KINDS, "base"))
        name = "base" if kind == "base" else f"{kind}{min(EACH, int(draw.paretovariate(1))) - 1}"
        text, count = draw.choice(TEXTS), draw.choice([1, 3, NEW_TOKENS])
        asked.append((kind, text, count, engine.submit(text, model=name, params=SamplingParams(max_new_tokens=count))))
        if draw.random() < 0.05:
            engine.cancel(draw.choice(asked)[-1])
        if draw.random() < 0.1:
            time.sleep(draw.random() * 0.02)
    answered = 0
    for kind, text, count, request in asked:
        try:
            assert request.result(300).tokens == wanted[kind, text][:count]
            answered += 1
        except MeswitchError as error:
            assert str(error) == "the request was cancelled"  # noqa: PT017
    assert answered > 0.9 * ARRIVALS
    assert engine.store.evictions > SLOTS
    assert engine._batch.reused_tokens > 0
    deadline = time.monotonic() + 20
    while engine.load() != {"waiting": 0, "running": 0} and time.monotonic() < deadline:
        time.sleep(0.01)
    pages = engine._batch._scheduler.pages
    assert pages.available == pages.count
    assert all(place.pins == 0 for place in engine.store.residency())
